"""SSD-ResNet34: a ResNet-34 cut after its third stage, five more blocks, twelve heads.

Parameter names, order and shapes are those of the MLCommons reference checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn

from export.architecture import Network
from export.ssd_resnet34.config import BOXES_PER_CELL, EXTRA_BLOCKS, HEAD_STRIDE, SSDConfig
from export.ssd_resnet34.postprocess import SSDPostProcess


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2015)."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample: nn.Sequential | None = None
        if cin != cout or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, h, w] to [N, cout, h / stride, w / stride]."""
        skip = x if self.downsample is None else self.downsample(x)
        y = nn.functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)) + skip
        return nn.functional.relu(y, inplace=True)


def _stage(blocks: int, cin: int, cout: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(cout, cout) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(cin, cout, stride), *rest)


class Backbone(nn.Module):
    """The first three stages of ResNet-34; the third keeps its stride at 1."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        c64, c128, c256 = (config.channels(c) for c in (64, 128, 256))
        self.layer1 = nn.Sequential(
            nn.Conv2d(3, c64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(c64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            _stage(3, c64, c64, 1),
            _stage(4, c64, c128, 2),
        )
        self.layer2 = nn.Sequential(_stage(6, c128, c256, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] to [N, C, S / 8, S / 8]."""
        features: Tensor = self.layer2(self.layer1(images))
        return features


class SSDResNet34(Network):
    """The detector without decoding and NMS: images to head tensors."""

    config: SSDConfig

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        blocks, cin = [], config.feature_channels[0]
        for block in EXTRA_BLOCKS:
            mid, out = config.channels(block.mid), config.channels(block.out)
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(cin, mid, 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(mid, out, 3, block.stride, block.padding),
                    nn.ReLU(inplace=True),
                )
            )
            cin = out
        self.additional_blocks = nn.ModuleList(blocks)
        heads = list(zip(config.feature_channels, BOXES_PER_CELL, strict=True))
        self.loc = nn.ModuleList(nn.Conv2d(c, 4 * n, 3, HEAD_STRIDE, 1) for c, n in heads)
        self.conf = nn.ModuleList(
            nn.Conv2d(c, config.num_classes * n, 3, HEAD_STRIDE, 1) for c, n in heads
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in (*self.loc, *self.conf):
            if isinstance(head, nn.Conv2d):  # a ReLU gain would saturate the softmax at start
                nn.init.xavier_uniform_(head.weight)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run backbone and heads; see `Network.forward`.

        Channels are coordinate * A + shape, and class * A + shape.
        """
        features = [self.model(images)]
        for block in self.additional_blocks:
            features.append(block(features[-1]))
        loc = [head(f) for head, f in zip(self.loc, features, strict=True)]
        conf = [head(f) for head, f in zip(self.conf, features, strict=True)]
        return loc, conf

    def postprocess(self) -> SSDPostProcess:
        """What makes detections of the head tensors."""
        return SSDPostProcess(self.config)

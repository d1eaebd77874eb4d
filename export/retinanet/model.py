"""RetinaNet on a ResNeXt-50 with a feature pyramid.

Parameter names, order and shapes are those of the MLCommons reference checkpoint, in which norms
are frozen; here they can be trained, and count their batches beside.
"""

from __future__ import annotations

import math
import re

from torch import Tensor, nn

from export.architecture import Network
from export.retinanet.config import ANCHORS_PER_CELL, STAGES, RetinaNetConfig
from export.retinanet.postprocess import RetinaNetPostProcess

PRIOR_PROBABILITY = 0.01
"""Score of every class before training; Lin et al. 2017, section 4.1."""


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a grouped 3x3 and a 1x1 convolution (Xie et al. 2017)."""

    def __init__(self, cin: int, mid: int, cout: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample: nn.Sequential | None = None
        if cin != cout or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, h, w] to [N, cout, h / stride, w / stride]."""
        skip = x if self.downsample is None else self.downsample(x)
        y = nn.functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = nn.functional.relu(self.bn2(self.conv2(y)), inplace=True)
        return nn.functional.relu(self.bn3(self.conv3(y)) + skip, inplace=True)


class Body(nn.Module):
    """ResNet-50 or ResNeXt-50 without its classifier."""

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        cin = config.width
        self.conv1 = nn.Conv2d(3, cin, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(cin)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for stage, blocks in enumerate(STAGES):
            mid = config.groups * config.group_width * 2**stage
            cout = 4 * config.width * 2**stage
            parts = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                parts.append(Bottleneck(cin, mid, cout, config.groups, stride))
                cin = cout
            stages.append(nn.Sequential(*parts))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def forward(self, images: Tensor) -> list[Tensor]:
        """[N, 3, H, W] to the last three stages' feature maps."""
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        features = []
        for stage in (self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features


class ExtraLevels(nn.Module):
    """P6 and P7, each half as large as the level before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)


class FeaturePyramid(nn.Module):
    """Three feature maps to five levels of as many channels each (Lin et al. 2017)."""

    def __init__(self, inputs: list[int], channels: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Conv2d(cin, channels, 1) for cin in inputs)
        self.layer_blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in inputs)
        self.extra_blocks = ExtraLevels(channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps, the largest first, to P3 to P7."""
        inner = [block(f) for block, f in zip(self.inner_blocks, features, strict=True)]
        merged = inner[-1]
        levels = [self.layer_blocks[-1](merged)]
        for lateral, block in zip(inner[-2::-1], list(self.layer_blocks)[-2::-1], strict=True):
            above = nn.functional.interpolate(merged, lateral.shape[2:], mode="nearest")
            merged = lateral + above
            levels.insert(0, block(merged))
        p6 = self.extra_blocks.p6(levels[-1])
        return [*levels, p6, self.extra_blocks.p7(nn.functional.relu(p6))]


class Backbone(nn.Module):
    """Body and pyramid."""

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.body = Body(config)
        self.fpn = FeaturePyramid([config.width * n for n in (8, 16, 32)], config.fpn_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[N, 3, H, W] to P3 to P7."""
        levels: list[Tensor] = self.fpn(self.body(images))
        return levels


def _tower(channels: int) -> nn.Sequential:
    """Four 3x3 convolutions, each with its ReLU."""
    parts: list[nn.Module] = []
    for _ in range(4):
        parts += [nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class ClassificationHead(nn.Module):
    """Features of a level to the logits of its anchors."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = _tower(channels)
        self.cls_logits = nn.Conv2d(channels, ANCHORS_PER_CELL * num_classes, 3, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, h, w] to [N, 9 * classes, h, w], channel = anchor * classes + class."""
        logits: Tensor = self.cls_logits(self.conv(features))
        return logits


class RegressionHead(nn.Module):
    """Features of a level to the deltas of its anchors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _tower(channels)
        self.bbox_reg = nn.Conv2d(channels, ANCHORS_PER_CELL * 4, 3, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, h, w] to [N, 36, h, w], channel = anchor * 4 + coordinate."""
        deltas: Tensor = self.bbox_reg(self.conv(features))
        return deltas


class Head(nn.Module):
    """The two heads, whose weights the levels share."""

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(config.fpn_channels, config.num_classes)
        self.regression_head = RegressionHead(config.fpn_channels)


class RetinaNet(Network):
    """The detector without decoding and NMS: images to head tensors."""

    config: RetinaNetConfig

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.head = Head(config)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.backbone.fpn.modules():
            if isinstance(module, nn.Conv2d):  # no ReLU follows
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        # The paper's, for the last convolutions alone: at 0.01 a narrow tower passes on next to
        # nothing of what it sees.
        logits = self.head.classification_head.cls_logits
        for last in (logits, self.head.regression_head.bbox_reg):
            nn.init.normal_(last.weight, std=0.01)
        if logits.bias is not None:
            nn.init.constant_(logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run backbone and heads; see `Network.forward`.

        Channels are anchor-major: anchor * 4 + coordinate (dx, dy, dw, dh) and
        anchor * classes + class.
        """
        levels = self.backbone(images)
        loc = [self.head.regression_head(level) for level in levels]
        return loc, [self.head.classification_head(level) for level in levels]

    def postprocess(self) -> RetinaNetPostProcess:
        """What makes detections of the head tensors."""
        return RetinaNetPostProcess(self.config)


def own_name(name: str) -> str:
    """Name of a tensor here; torchvision has put a layer around some convolutions since 0.13."""
    name = re.sub(r"(\.fpn\.(?:inner|layer)_blocks\.\d+)\.0\.(?=\w+$)", r"\1.", name)
    return re.sub(
        r"(\.\w+_head\.conv)\.(\d)\.0\.(?=\w+$)", lambda m: f"{m[1]}.{2 * int(m[2])}.", name
    )

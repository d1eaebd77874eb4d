"""The shape of a RetinaNet: everything that follows from image, classes and widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from export.config import LARGEST_IMAGE, Config, conv_size
from export.errors import ExportError

STAGES = (3, 4, 6, 3)
"""Bottlenecks of each stage of a ResNet-50; He et al. 2015."""

ANCHORS_PER_CELL = 9
"""Three sizes in three ratios; Lin et al. 2017, "Focal Loss for Dense Object Detection"."""

KEEP = 300
"""Detections of an image; the MLCommons reference."""


@dataclass(frozen=True)
class RetinaNetConfig(Config):
    """A RetinaNet on a ResNet-50 or ResNeXt-50; the defaults are the MLPerf model.

    Attributes
    ----------
    image_height, image_width
        Of the input image, in pixels.
    num_classes
        Classes; there is no background.
    width
        Channels of the first convolution; a stage gives 4, 8, 16 and 32 times as many.
    groups, group_width
        Groups of a bottleneck's 3x3 convolution, and channels of each in the first stage, which
        double from stage to stage. A ResNet-50 has 1 and `width`.
    fpn_channels
        Channels of the feature pyramid and of the heads.

    Raises
    ------
    ExportError
        When the image has too few anchors, or a value is out of range.
    """

    image_height: int = 800
    image_width: int = 800
    num_classes: int = 264
    width: int = 64
    groups: int = 32
    group_width: int = 4
    fpn_channels: int = 256

    def __post_init__(self) -> None:
        for name in ("num_classes", "width", "groups", "group_width", "fpn_channels"):
            if getattr(self, name) < 1:
                raise ExportError(f"{name} must be at least 1, not {getattr(self, name)}")
        size = f"{self.image_height}x{self.image_width}"
        if max(self.image_shape) > LARGEST_IMAGE:
            raise ExportError(f"image {size}: a side must be at most {LARGEST_IMAGE}")
        if min(self.image_shape) < 1 or self.num_priors < KEEP:
            raise ExportError(f"image {size} is too small: fewer than {KEEP} anchors")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input image."""
        return self.image_height, self.image_width

    @property
    def feature_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the five feature maps, P3 to P7; 100 to 7 at 800x800."""
        rows, columns = map(_feature_sizes, self.image_shape)
        return tuple(zip(rows, columns, strict=True))

    @property
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """Anchors of a cell, rows and columns of each level's grid."""
        return tuple((ANCHORS_PER_CELL, *shape) for shape in self.feature_shapes)

    def resized(self, height: int, width: int) -> RetinaNetConfig:
        """The same network for another image."""
        return replace(self, image_height=height, image_width=width)

    def inferred(self, tensors: Mapping[str, Tensor]) -> RetinaNetConfig:
        """Widths and classes of weights; what does not fit is left to the check of their names."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found = {}
        match shapes.get("backbone.body.conv1.weight"):
            case (width, _, _, _):
                found["width"] = width
        match shapes.get("backbone.body.layer1.0.conv2.weight"):
            case (channels, group_width, _, _) if group_width:
                found |= {"group_width": group_width, "groups": channels // group_width}
        match shapes.get("backbone.fpn.inner_blocks.0.bias"):
            case (channels,):
                found["fpn_channels"] = channels
        match shapes.get("head.classification_head.cls_logits.bias"):
            case (channels,):
                found["num_classes"] = channels // ANCHORS_PER_CELL
        return replace(self, **{name: value for name, value in found.items() if value >= 1})


def _feature_sizes(side: int) -> list[int]:
    size = conv_size(conv_size(side, 7, 2, 3), 3, 2, 1)  # stem, max pool; the first stage keeps it
    sizes = []
    for _ in range(5):  # the other three stages, P6, P7
        size = conv_size(size, 3, 2, 1)
        sizes.append(size)
    return sizes

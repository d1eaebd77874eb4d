"""The shape of the network: everything that follows from image size, classes and width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from export.config import LARGEST_IMAGE, Config, conv_size
from export.errors import ExportError

ASPECT_RATIOS: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
"""Aspect ratios of the default boxes per level, MLCommons ssd_r34.py."""

BOXES_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)
"""Default boxes per grid cell and level: two squares, and each ratio both ways."""


@dataclass(frozen=True)
class ExtraBlock:
    """One of the five blocks behind the backbone: 1x1 convolution, then 3x3."""

    mid: int
    out: int
    stride: int
    padding: int


EXTRA_BLOCKS = (
    ExtraBlock(256, 512, 2, 1),
    ExtraBlock(256, 512, 2, 1),
    ExtraBlock(128, 256, 2, 1),
    ExtraBlock(128, 256, 2, 0),
    ExtraBlock(128, 256, 1, 0),
)
"""Channels at width 64, strides and paddings of the additional blocks, MLCommons ssd_r34.py."""

HEAD_STRIDE = 3
"""Stride of all twelve 3x3 head convolutions (padding 1)."""


@dataclass(frozen=True)
class SSDConfig(Config):
    """An SSD-ResNet34; the defaults are the MLPerf model.

    Attributes
    ----------
    image_size
        Side of the square input image in pixels.
    num_classes
        Classes including background, which is class 0.
    width
        Channels of the first convolution; every other channel count scales with it.

    Raises
    ------
    ExportError
        When the image is too small for the six feature maps, or a value is out of range.
    """

    image_size: int = 1200
    num_classes: int = 81
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise ExportError(f"width must be an even number from 2, not {self.width}")
        if self.num_classes < 2:
            raise ExportError(f"num_classes counts background: at least 2, not {self.num_classes}")
        if self.image_size > LARGEST_IMAGE:
            raise ExportError(f"image_size must be at most {LARGEST_IMAGE}")
        if self.image_size < 1 or min(self.feature_sizes) < 1:
            raise ExportError(
                f"image_size {self.image_size} is too small: feature maps {self.feature_sizes}"
            )

    def channels(self, at_width_64: int) -> int:
        """Channel count of a layer that has `at_width_64` channels in the MLPerf model."""
        return at_width_64 * self.width // 64

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Side of each of the six feature maps that the heads read; 150..7 at 1200."""
        size = conv_size(self.image_size, 7, 2, 3)  # stem
        size = conv_size(size, 3, 2, 1)  # max pool
        size = conv_size(size, 3, 2, 1)  # second stage; the third keeps its size
        sizes = [size]
        for block in EXTRA_BLOCKS:
            sizes.append(conv_size(sizes[-1], 3, block.stride, block.padding))
        return tuple(sizes)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each of the six feature maps."""
        return (self.channels(256), *(self.channels(block.out) for block in EXTRA_BLOCKS))

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Side of each level's grid of default boxes; 50, 25, 13, 7, 3, 3 at 1200."""
        return tuple(conv_size(size, 3, HEAD_STRIDE, 1) for size in self.feature_sizes)

    @property
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """Default boxes of a cell, rows and columns of each level's grid."""
        return tuple((n, g, g) for n, g in zip(BOXES_PER_CELL, self.grid_sizes, strict=True))

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input image."""
        return self.image_size, self.image_size

    def resized(self, height: int, width: int) -> SSDConfig:
        """The same network for another image, which must be square."""
        if height != width:
            raise ExportError(f"SSD-ResNet34 takes square images, not {height}x{width}")
        return replace(self, image_size=height)

    def inferred(self, tensors: Mapping[str, Tensor]) -> SSDConfig:
        """Width and classes of weights; what does not fit is left to the check of their names."""
        config = self
        stem, conf = tensors.get("model.layer1.0.weight"), tensors.get("conf.0.bias")
        if stem is not None and stem.ndim == 4 and stem.shape[0] % 2 == 0:
            config = replace(config, width=stem.shape[0])
        if conf is not None and conf.ndim == 1 and conf.shape[0] >= 2 * BOXES_PER_CELL[0]:
            config = replace(config, num_classes=conf.shape[0] // BOXES_PER_CELL[0])
        return config

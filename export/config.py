"""The shape of the network: everything that follows from image size, classes and width."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

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

LARGEST_IMAGE = 4096
"""Side of an image; PyTorch and ONNX Runtime run some before a file is written."""

HEAD_STRIDE = 3
"""Stride of all twelve 3x3 head convolutions (padding 1)."""


def _conv(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


@dataclass(frozen=True)
class SSDConfig:
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
        size = _conv(self.image_size, 7, 2, 3)  # stem
        size = _conv(size, 3, 2, 1)  # max pool
        size = _conv(size, 3, 2, 1)  # second stage; the third keeps its size
        sizes = [size]
        for block in EXTRA_BLOCKS:
            sizes.append(_conv(sizes[-1], 3, block.stride, block.padding))
        return tuple(sizes)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each of the six feature maps."""
        return (self.channels(256), *(self.channels(block.out) for block in EXTRA_BLOCKS))

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Side of each level's grid of default boxes; 50, 25, 13, 7, 3, 3 at 1200."""
        return tuple(_conv(size, 3, HEAD_STRIDE, 1) for size in self.feature_sizes)

    @property
    def num_priors(self) -> int:
        """Default boxes in all; 15130 at 1200."""
        return sum(n * g * g for n, g in zip(BOXES_PER_CELL, self.grid_sizes, strict=True))

    def to_json(self) -> str:
        """One-line JSON, as stored in checkpoints and ONNX metadata under ``ssd_config``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SSDConfig:
        """Inverse of `to_json`. Raises ExportError on anything else."""
        try:
            fields = json.loads(text, object_pairs_hook=_once)
            if not all(type(value) is int for value in fields.values()):
                raise TypeError("whole numbers expected")
            return cls(**fields)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"not an SSD configuration: {text[:80]!r} ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return fields

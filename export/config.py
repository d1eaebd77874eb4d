"""What every detector's configuration can do."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor

from export.errors import ExportError

LARGEST_IMAGE = 4096
"""Side of an image; PyTorch and ONNX Runtime run some before a file is written."""


@dataclass(frozen=True)
class Config(ABC):
    """The shape of a network, whole numbers alone; the defaults are the MLPerf model."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input image in pixels."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes, with background where the detector has one."""

    @property
    @abstractmethod
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """Anchors of a cell, rows and columns of each level's grid."""

    @property
    def num_priors(self) -> int:
        """Anchors (default boxes) in all; 15130 in the MLPerf SSD, 120087 in its RetinaNet."""
        return sum(anchors * rows * columns for anchors, rows, columns in self.levels)

    @abstractmethod
    def resized(self, height: int, width: int) -> Self:
        """The same network for another image. Raises ExportError where it cannot have that."""

    @abstractmethod
    def inferred(self, tensors: Mapping[str, Tensor]) -> Self:
        """The configuration that the shapes of weights tell; what they do not tell stays."""

    def to_json(self) -> str:
        """One-line JSON, as stored in checkpoints and ONNX metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`. Raises ExportError on anything else."""
        try:
            fields = json.loads(text, object_pairs_hook=_once)
            if not all(type(value) is int for value in fields.values()):
                raise TypeError("whole numbers expected")
            return cls(**fields)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"not an {cls.__name__}: {text[:80]!r} ({error})") from error


def conv_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Side of what a convolution or pooling makes of an image of side `size`."""
    return (size + 2 * padding - kernel) // stride + 1


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return fields

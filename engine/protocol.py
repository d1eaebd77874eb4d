"""What an engine is: images in, detections out. Everything the harness may know about a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

DETECTION_FIELDS = 7
"""Columns of a detection row: image index, ymin, xmin, ymax, xmax, score, label."""


class EngineError(Exception):
    """A user-visible failure of an engine: what was wrong, where, what to do. One line."""


@dataclass(frozen=True)
class InputSpec:
    """The image tensor that an engine takes.

    Attributes
    ----------
    name
        Name of the graph input.
    shape
        (channels, height, width) of one image, NCHW without the batch dimension.
    dtype
        ``float32`` for normalised images, ``int8`` for images divided by `scale`.
    scale
        INT8 only: real value of one step (symmetric, zero point 0). None for float32.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: Literal["float32", "int8"]
    scale: float | None = None


def check_images(images: NDArray[np.generic], spec: InputSpec, taker: str) -> None:
    """Check the dtype and the shape of a batch against what ``the <taker>`` takes.

    Raises
    ------
    EngineError
        When one of them is another.
    """
    if images.dtype != spec.dtype:
        raise EngineError(f"images are {images.dtype}, the {taker} takes {spec.dtype}")
    if images.ndim != 4 or images.shape[1:] != spec.shape or not len(images):
        raise EngineError(
            f"images have the shape {images.shape}, the {taker} takes (N >= 1, "
            f"{', '.join(map(str, spec.shape))})"
        )


class Session(Protocol):
    """One stream of execution of an engine. Not shared between threads."""

    def infer(self, images: NDArray[np.generic]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Detect objects in a batch.

        Parameters
        ----------
        images
            [N, *spec.shape] of the input spec's dtype, C-contiguous, 1 <= N <= max_batch.

        Returns
        -------
        detections
            float32 [N, keepTopK, 7]: image index in the batch, ymin, xmin, ymax, xmax (normalised,
            clipped to [0, 1]), score, label; descending score; unused rows have label -1.
        num_detections
            int32 [N], valid rows per image.
        """
        ...

    def close(self) -> None:
        """Release what the session holds, GPU memory above all; it cannot be used afterwards."""
        ...


class Engine(Protocol):
    """A loaded model, ready to open sessions."""

    @property
    def input_spec(self) -> InputSpec:
        """The image tensor it takes."""
        ...

    @property
    def max_batch(self) -> int | None:
        """Largest batch it accepts; None when the batch is unbounded."""
        ...

    @property
    def manifest(self) -> Mapping[str, object]:
        """What it is: backend, version, device, SHA-256 of the ONNX file. JSON-serialisable."""
        ...

    def session(self) -> Session:
        """Open a new session."""
        ...

"""What an engine is: images in, detections out. Everything the harness may know about a backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.errors import EngineError

DETECTION_FIELDS = 7
"""Columns of a detection row: image index, ymin, xmin, ymax, xmax, score, label."""

DETECTIONS, NUM_DETECTIONS = "detections", "num_detections"
"""Names of a detector's outputs, as `Session.result` returns them."""

TARGET_KEY = "target"
"""Metadata of an INT8 file that is for ONNX Runtime on CPUs alone; its value is ``cpu``."""

CORRECTION_KEY = "correction"
"""Metadata of an INT8 file that was corrected on the calibration images; ``bias``: its biases."""

EQUALISED_KEY = "equalised_on"
"""Metadata of a file whose channels were equalised: the number of calibration images."""

INPUT_SCALE_KEY = "input_scale"
"""ONNX metadata key that holds the real value of one step of an INT8 image input."""


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

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON has them."""
        return {**asdict(self), "shape": list(self.shape)}


def output_shapes(keep_top_k: int | None) -> dict[str, list[int | None]]:
    """Shapes of an engine's outputs for one image; None where the model leaves a size open."""
    return {DETECTIONS: [keep_top_k, DETECTION_FIELDS], NUM_DETECTIONS: []}


def first_label(manifest: Mapping[str, object]) -> int:
    """Label of an engine's first class: 0 of a model without background; 1 where it is not said."""
    return int(str(manifest.get("first_label", 1)))


def corrections_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file's metadata says of corrections on calibration images, as manifests have it."""
    return {key: metadata[key] for key in (CORRECTION_KEY, EQUALISED_KEY) if key in metadata}


def input_scale(metadata: Mapping[str, str], model: Path) -> float:
    """Read the scale of an INT8 image input from a model's metadata.

    Raises
    ------
    EngineError
        When there is none, or it is no positive number.
    """
    text = metadata.get(INPUT_SCALE_KEY)
    if text is None:
        raise EngineError(
            f"{model}: an int8 input without the metadata {INPUT_SCALE_KEY!r}; quantise the model "
            "with 'engine quantize', which writes it"
        )
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise EngineError(
            f"{model}: metadata {INPUT_SCALE_KEY!r} is {text!r}; a positive number expected"
        )
    return scale


def check_batch(
    images: Sequence[NDArray[np.generic]],
    spec: InputSpec,
    max_batch: int | None = None,
    *,
    taker: str = "engine",
    too_large: str | None = None,
) -> int:
    """Check a batch, given as runs of images, against what an engine takes.

    Parameters
    ----------
    images, spec
        The runs, and what an image is.
    max_batch
        Largest batch; None: any.
    taker
        What messages call that which takes them.
    too_large
        What a message says of a larger batch; None: how many images are taken.

    Returns
    -------
    int
        Images of the batch.

    Raises
    ------
    EngineError
        When its dtype, shape or number is another.
    """
    total = 0
    for run in images:
        if run.dtype != spec.dtype:
            raise EngineError(f"images are {run.dtype}, the {taker} takes {spec.dtype}")
        if run.ndim != 4 or run.shape[1:] != spec.shape or not len(run):
            raise EngineError(
                f"images have the shape {run.shape}, the {taker} takes (N >= 1, "
                f"{', '.join(map(str, spec.shape))})"
            )
        total += len(run)
    if not total:
        raise EngineError("a batch without images")
    if max_batch is not None and total > max_batch:
        limit = too_large or f"the {taker} takes 1 to {max_batch}"
        raise EngineError(f"a batch of {total} images, {limit}")
    return total


class Session(Protocol):
    """One stream of execution of an engine.

    One thread submits batches, and one, the same or another, takes their results, in the same
    order.
    """

    @property
    def depth(self) -> int:
        """Batches that may be in flight: submitted, and their results not taken; 1 or more."""
        ...

    def submit(self, images: Sequence[NDArray[np.generic]]) -> None:
        """Start on a batch.

        Parameters
        ----------
        images
            Runs of images: arrays [n, *spec.shape] of the input spec's dtype, C-contiguous, which
            are the batch one after the other; 1 <= sum of n <= max_batch. They must not change
            until the result has been taken. Fast where they lie in memory of `Engine.host_array`.

        Raises
        ------
        EngineError
            When the images are not what the engine takes, `depth` batches are in flight, or the
            batch cannot be started.
        SessionLostError
            When the session cannot go on.
        """
        ...

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Wait for the oldest batch in flight.

        Returns
        -------
        detections
            float32 [N, keepTopK, 7]: image index in the batch, ymin, xmin, ymax, xmax (normalised,
            clipped to [0, 1]), score, label; descending score; unused rows have label -1. Valid
            until the next call.
        num_detections
            int32 [N], valid rows per image; valid until the next call.

        Raises
        ------
        EngineError
            When no batch is in flight, or it failed.
        SessionLostError
            When the session cannot go on.
        """
        ...

    def infer(self, images: NDArray[np.generic]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Detect objects in a batch, from `submit` to `result`; the arrays are the caller's.

        Parameters
        ----------
        images
            [N, *spec.shape], the whole batch.
        """
        self.submit([images])
        detections, counts = self.result()
        return detections.copy(), counts.copy()

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
        """What it is: backend, version, device, SHA-256 of the ONNX file, input and outputs.

        JSON-serialisable.
        """
        ...

    def session(self) -> Session:
        """Open a new session."""
        ...

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate host memory from which the engine takes images fastest, as pinned on a GPU.

        It is freed when no array refers to it any more.
        """
        ...


@runtime_checkable
class TellsLayers(Protocol):
    """What an engine has besides that can tell how long its layers take."""

    @property
    def tells_layers(self) -> bool:
        """Whether it can on this device."""
        ...

    def layer_times(self, batch: int) -> tuple[int, Mapping[str, float]]:
        """Median milliseconds of each layer for a batch of noise, in the order in which they run.

        Before them, the images of the batch, which are more where a smaller one is filled up.
        Layers run one after the other for it, so that their sum may be more than a batch takes.

        Raises
        ------
        EngineError
            When it fails.
        """
        ...

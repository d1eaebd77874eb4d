"""What an engine says of a batch, checked, and as MLPerf's response payloads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.protocol import DETECTION_FIELDS

_ROW_BYTES = DETECTION_FIELDS * np.dtype(np.float32).itemsize


def check_outputs(detections: NDArray[np.float32], counts: NDArray[np.int32], batch: int) -> None:
    """Check what an engine returned for a batch.

    Raises
    ------
    EngineError
        When dtype or shape is not the protocol's, a count is out of range, or a valid row is not
        finite.
    """
    if detections.dtype != np.float32 or counts.dtype != np.int32:
        raise EngineError(
            f"the engine returned {detections.dtype} detections and {counts.dtype} counts; "
            "float32 and int32 expected"
        )
    if (
        detections.ndim != 3
        or detections.shape[::2] != (batch, DETECTION_FIELDS)
        or counts.shape != (batch,)
    ):
        raise EngineError(
            f"the engine returned detections {detections.shape} and counts {counts.shape} for "
            f"{batch} images; ({batch}, keepTopK, {DETECTION_FIELDS}) and ({batch},) expected"
        )
    used = counts.tolist()  # of small arrays, Python's min and max take less time than NumPy's
    if min(used) < 0 or max(used) > detections.shape[1]:
        raise EngineError(
            f"the engine returned a count of {min(used)}..{max(used)} detections; "
            f"0..{detections.shape[1]} possible"
        )


def pack(
    detections: NDArray[np.float32], counts: NDArray[np.int32], indices: Sequence[int]
) -> tuple[NDArray[np.float32], list[int]]:
    """Valid detections of a batch as MLPerf's response payloads.

    Parameters
    ----------
    detections
        float32 [N, keepTopK, 7], see `engine.protocol.Session.infer`.
    counts
        int32 [N], valid rows per image.
    indices
        N QSL indices; below 2**24 they are exact in float32.

    Returns
    -------
    rows
        float32 [sum(counts), 7], one image after the other: QSL index, ymin, xmin, ymax, xmax,
        score, label.
    sizes
        N, bytes of each image's payload in `rows`.

    Raises
    ------
    EngineError
        When a valid row holds a NaN or an infinity.
    """
    rows = detections[np.arange(detections.shape[1]) < counts[:, None]]
    if not np.isfinite(rows).all():
        raise EngineError("the engine returned NaN or infinite detections")
    rows[:, 0] = np.repeat(indices, counts)
    return rows, [count * _ROW_BYTES for count in counts.tolist()]

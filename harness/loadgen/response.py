"""What an engine says of a batch, checked, and as MLPerf's response payloads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.protocol import DETECTION_FIELDS

ANY_LABEL = range(1, 2**24)
"""Where nothing is known of labels but that they are float32 and 0 the background."""

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
    detections: NDArray[np.float32],
    counts: NDArray[np.int32],
    indices: Sequence[int],
    *,
    checked: bool = True,
    labels: range = ANY_LABEL,
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
    checked
        Whether to look at the order of rows, too, which takes longer than all else here.
    labels
        Those that a detection may have.

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
        When a valid row holds a NaN or an infinity. Checked: when its image index is not the
        position in the batch, its label none of `labels`, a box has its corners swapped, or
        the scores of an image do not fall.
    """
    rows = detections[np.arange(detections.shape[1]) < counts[:, None]]
    if not np.isfinite(rows).all():
        raise EngineError("the engine returned NaN or infinite detections")
    if checked:
        _check_rows(rows, np.repeat(np.arange(len(counts)), counts), labels)
    rows[:, 0] = np.repeat(indices, counts)
    return rows, [count * _ROW_BYTES for count in counts.tolist()]


def _check_rows(rows: NDArray[np.float32], images: NDArray[np.int64], labels: range) -> None:
    """Check finite rows [R, 7], whose images are at these positions [R] of the batch."""
    image, ymin, xmin, ymax, xmax, score, label = rows.T
    rising = np.zeros(len(rows), bool)
    rising[1:] = (score[1:] > score[:-1]) & (images[1:] == images[:-1])
    first, last = labels.start, labels[-1]
    for bad, what in (
        (image != images, "an image index that is not its image's: are rows in another order?"),
        (
            (label != np.rint(label)) | (label < first) | (label > last),
            f"a label outside {first}..{last}",
        ),
        ((ymin > ymax) | (xmin > xmax), "a box whose corners are swapped"),
        (rising, "a higher score than the row before"),
    ):
        if bad.any():
            row, where = rows[bad][0].tolist(), images[bad][0]
            shown = ", ".join(f"{value:g}" for value in row)
            raise EngineError(f"the engine returned {what} (image {where} of a batch: {shown})")

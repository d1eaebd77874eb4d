"""Detections of a graph's outputs, whatever their names."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.protobuf import Arrays

Floats = NDArray[np.float32]


def read_rows(outputs: Arrays) -> list[Floats]:
    """Detections of every image as [n, 7]: image index, box, score, label.

    Understood are [N, K, 7] with the valid rows counted in [N], and boxes [N, n, 4] with scores
    and integer labels [N, n], whatever their names; of one image also without N.
    """
    if sorted(value.ndim for value in outputs.values()) == [1, 1, 2]:
        outputs = {name: value[None] for name, value in outputs.items()}
    by_kind = {(value.ndim, value.dtype.kind): value for value in outputs.values()}
    if len(outputs) == 2 and (3, "f") in by_kind and (1, "i") in by_kind:
        detections, counts = by_kind[3, "f"], by_kind[1, "i"]
        if detections.shape[2] == 7:
            return [rows[:count] for rows, count in zip(detections, counts, strict=True)]
    if len(outputs) == 3 and by_kind.keys() == {(3, "f"), (2, "f"), (2, "i")}:
        boxes, scores, labels = by_kind[3, "f"], by_kind[2, "f"], by_kind[2, "i"]
        index = np.broadcast_to(np.arange(len(boxes))[:, None], scores.shape)
        columns = [index[..., None], boxes, scores[..., None], labels[..., None]]
        return list(np.concatenate(columns, axis=2).astype(np.float32))
    found = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in outputs.items())
    raise SurgeryError(
        f"the outputs behind NonMaxSuppression are {found}; understood are detections [N, K, 7] "
        "with counts [N], or boxes [N, n, 4] with scores and integer labels [N, n]; export with "
        "these alone"
    )

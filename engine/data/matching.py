"""Which detections of one run are those of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_IOU = 0.9
"""Detections of one object by two engines overlap at least this much."""

MARGIN = 1e-5
"""Added to every side of a box, about a hundredth of a pixel: so a box that clipping left as a line
on the edge of the image has an area, far above the rounding of its coordinates."""


@dataclass(frozen=True)
class Matches:
    """Pairs of detections of two runs on one image.

    Attributes
    ----------
    pairs
        int64 [m, 2]: row of the first run, row of the second; each row at most once.
    iou
        float64 [m], of each pair.
    score_difference
        float64 [m], second score minus first.
    missed
        Rows of the first run without a partner.
    extra
        Rows of the second run without a partner.
    """

    pairs: NDArray[np.int64]
    iou: NDArray[np.float64]
    score_difference: NDArray[np.float64]
    missed: int
    extra: int


def match_detections(
    first: NDArray[np.float32], second: NDArray[np.float32], min_iou: float = MIN_IOU
) -> Matches:
    """Pair detections of the same label whose boxes overlap, best overlap first.

    After non-maximum suppression at IoU 0.5 a box has at most one possible partner at IoU 0.9, so
    that no other way of pairing finds more.

    Parameters
    ----------
    first, second
        float32 [n, 7]: image index, ymin, xmin, ymax, xmax, score, label; valid rows of one image.
    min_iou
        Smallest IoU of a pair.

    Returns
    -------
    Matches
        The pairs, by descending IoU.
    """
    iou = box_iou(first[:, 1:5], second[:, 1:5])
    iou[first[:, None, 6] != second[None, :, 6]] = -1
    order = np.argsort(-iou, axis=None, kind="stable")[: int((iou >= min_iou).sum())]
    free_first, free_second = np.ones(len(first), bool), np.ones(len(second), bool)
    pairs = []
    for row, column in zip(*np.unravel_index(order, iou.shape), strict=True):
        if free_first[row] and free_second[column]:
            free_first[row] = free_second[column] = False
            pairs.append((row, column))
    found = np.array(pairs, np.int64).reshape(-1, 2)
    rows, columns = found.T
    difference = second[columns, 5].astype(np.float64) - first[rows, 5]
    return Matches(
        found, iou[rows, columns], difference, int(free_first.sum()), int(free_second.sum())
    )


def box_iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intersection over union of every box with every other.

    Parameters
    ----------
    first, second
        float32 [n, 4] and [m, 4]: ymin, xmin, ymax, xmax.

    Returns
    -------
    ndarray
        float64 [n, m], of the boxes with their `MARGIN`.
    """
    margin = np.array([-MARGIN, -MARGIN, MARGIN, MARGIN])
    a, b = first[:, None] + margin, second[None] + margin
    size = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0)
    common = size.prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1)
    iou: NDArray[np.float64] = common / (union - common)
    return iou

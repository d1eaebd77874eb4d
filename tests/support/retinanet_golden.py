"""RetinaNet's golden tails as NMS_OPT_TRT takes them, and how its rows are held against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from graph_surgery.nms_function import NmsAttributes

LEVELS = ("p3", "p4", "p5", "p6", "p7")
ANCHORS = 9
PIXELS, SCORE = 2e-3, 1e-6
"""Fair tolerances of a coordinate and a score, by the data's README."""


@dataclass(frozen=True)
class Tail:
    """Heads and detections of one case.

    Attributes
    ----------
    size
        Height and width in pixels.
    levels
        (anchors, height, width).
    priors
        [2, P * 4, 1] of the operator.
    loc, conf
        [N, 4, P] and [N, K, P], priors by anchor, then cell, as the operator has them.
    expected
        Of each image boxes [n, 4] in pixels ltrb, scores [n], labels [n].
    """

    size: tuple[int, int]
    levels: list[tuple[int, int, int]]
    priors: np.ndarray
    loc: np.ndarray
    conf: np.ndarray
    expected: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def retinanet_attributes(classes: int) -> NmsAttributes:
    """RetinaNet's tail, as torchvision and MLPerf have it."""
    return NmsAttributes(
        numClasses=classes,
        topK=5000,
        keepTopK=300,
        confidenceThreshold=0.05,
        nmsThreshold=0.5,
        backgroundLabelId=-1,
        numLayers=5,
        inputOrder=(0, 5, 10),
        confSigmoid=1,
        confSoftmax=0,
        levelTopK=1000,
        clipBeforeNms=1,
        bboxXformClip=float(np.log(1000 / 16)),
    )


def reference(golden: Path, name: str) -> Path:
    """A file of RetinaNet's golden data; the test is skipped where it is not there."""
    path = golden / "retinanet" / name
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    return path


def load_tail(golden: Path, case: str) -> Tail:
    """Read `tail_CASE.npz`; skip where it is not there."""
    data = np.load(reference(golden, f"tail_{case}.npz"))
    cls = [_head(data, f"cls_{level}", "cls_fill") for level in LEVELS]
    reg = [_head(data, f"reg_{level}", "reg_fill") for level in LEVELS]
    if "image_size" in data:
        size = tuple(int(one) for one in np.broadcast_to(data["image_size"], 2))
    else:
        size = (800, 800)
    levels = [(ANCHORS, *head.shape[2:]) for head in cls]
    images = len(cls[0])
    expected = [
        tuple(data[f"{what}_{i}"] for what in ("boxes", "scores", "labels")) for i in range(images)
    ]
    return Tail(
        size,
        levels,
        anchor_priors(golden, size, levels),
        np.concatenate([_rows(head) for head in reg], axis=2),
        np.concatenate([_rows(head) for head in cls], axis=2),
        expected,
    )


def _head(data, name: str, fill: str) -> np.ndarray:
    if name in data:
        return data[name]
    shape = data[f"{name}_shape"]
    head = np.full(int(np.prod(shape)), data[fill], np.float32)
    head[data[f"{name}_idx"]] = data[f"{name}_val"]
    return head.reshape(shape)


def _rows(head: np.ndarray) -> np.ndarray:
    """Channels a * R + row [N, A * R, h, w] to [N, R, A * h * w]."""
    images, channels, height, width = head.shape
    rows = head.reshape(images, ANCHORS, channels // ANCHORS, height, width)
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3, 4)).reshape(
        images, channels // ANCHORS, -1
    )


def anchor_priors(golden: Path, size, levels) -> np.ndarray:
    """The golden anchors, pixels in the order cell, anchor, as the operator's priors."""
    height, width = size
    anchors = np.load(reference(golden, "anchors.npz"))[f"a_{height}x{width}"]
    ends = np.cumsum([a * h * w for a, h, w in levels])[:-1]
    parts = [
        part.reshape(-1, ANCHORS, 4).transpose(1, 0, 2).reshape(-1, 4)
        for part in np.split(anchors.astype(np.float64), ends)
    ]
    ltrb = np.concatenate(parts) / [width, height, width, height]
    return np.stack([ltrb, np.ones_like(ltrb)]).astype(np.float32).reshape(2, -1, 1)


def check_golden(rows: np.ndarray, expected, size, score: float = SCORE) -> None:
    """Detections [n, 7] of one image against golden ones; rows of equal score are a set."""
    height, width = size
    boxes, scores, labels = expected
    assert len(rows) == len(scores)
    corners = rows[:, [2, 1, 4, 3]] * np.tile([width, height], 2)
    got = np.column_stack([rows[:, 5:], corners])
    want = np.column_stack([scores, labels, boxes])
    np.testing.assert_allclose(got[:, 0], want[:, 0], atol=score, rtol=0)
    assert (np.diff(got[:, 0]) <= 0).all()
    start = 0
    for end in [*np.flatnonzero(np.diff(want[:, 0])) + 1, len(want)]:
        one, other = got[start:end], want[start:end]
        one = one[np.lexsort(np.round(one[:, 1:], 1).T)]
        other = other[np.lexsort(np.round(other[:, 1:], 1).T)]
        assert one[:, 1].tolist() == other[:, 1].tolist()
        np.testing.assert_allclose(one[:, 2:], other[:, 2:], atol=PIXELS, rtol=0)
        start = end

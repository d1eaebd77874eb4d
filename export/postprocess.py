"""What the postprocesses of all detectors share: PyTorch modules from head tensors to detections.

Two steps have no PyTorch operator with the semantics we need: a top-k whose ties go to the lower
index, and greedy NMS in many independent rows. They are custom operators, so that the exporter
can translate each into the one ONNX operator that means it (`onnx_export`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.config import Config
from graph_surgery.rounding import Rules

Floats = NDArray[np.float32]


@torch.library.custom_op("detectors::stable_topk", mutates_args=())
def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the `k` largest along the last axis, descending; equal values in index order.

    Returns float32 values and int64 indices, each [..., k]; `values` are float32 without NaN.
    """
    # One number holds value and place, so that none is equal: a stable sort of all takes minutes
    # where there are millions. A float's bits are in the order of the floats once those of the
    # negative are flipped; adding 0 makes one of the two zeros.
    bits = (values + 0.0).view(torch.int32)
    bits = bits ^ (bits >> 31 & 0x7FFFFFFF)
    keys = (
        bits.to(torch.int64).mul_(2**32).sub_(torch.arange(values.shape[-1], device=values.device))
    )
    index = keys.topk(k, dim=-1).indices
    return values.gather(-1, index), index


@stable_topk.register_fake
def _(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*values.shape[:-1], k)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("detectors::greedy_nms", mutates_args=())
def greedy_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float
) -> Tensor:
    """Greedy NMS in each of C independent rows of K scores, for R sets of K boxes.

    Parameters
    ----------
    boxes
        float32 [R, K, 4], ltrb.
    scores
        float32 [R, C, K]. The highest comes first; of equal ones, that of the lower index.
    iou_threshold, score_threshold
        A box is dropped when its IoU with a kept one is larger, or its score is not larger.

    Returns
    -------
    bool [R, C, K], True where the box is kept.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    counts = (scores > score_threshold).sum(dim=2)
    which, row = counts.nonzero(as_tuple=True)
    most = int(counts.amax())  # few reach the threshold
    ranked, order = scores[which, row].sort(dim=1, descending=True, stable=True)
    order = order[:, :most]
    kept = ranked[:, :most] > score_threshold
    candidates = boxes[which[:, None], order]
    areas = (candidates[..., 2:] - candidates[..., :2]).clamp(min=0).prod(-1)
    for i in range(most - 1):
        box, others = candidates[:, i, None], candidates[:, i + 1 :]
        lt, rb = torch.maximum(box[..., :2], others[..., :2]), box[..., 2:].minimum(others[..., 2:])
        overlap = (rb - lt).clamp(min=0).prod(-1)
        iou = overlap / (areas[:, i, None] + areas[:, i + 1 :] - overlap)
        # the NaN of two empty boxes is not larger
        kept[:, i + 1 :] &= ~(kept[:, i, None] & (iou > iou_threshold))
    keep[which[:, None], row[:, None], order] = kept
    return keep


@greedy_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:  # noqa: ARG001
    return scores.new_empty(scores.shape, dtype=torch.bool)


def finite(values: Tensor, dim: int) -> Tensor:
    """Whether all values along an axis are finite: only then each times 0 is 0."""
    return (values * 0.0).sum(dim=dim) == 0


def to_rows(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Write the detections that an image keeps.

    Parameters
    ----------
    boxes, scores, labels
        float32 [N, keep, 4] ltrb in fractions of the image and clipped to it; float32 [N, keep],
        descending, not positive behind the last detection; int64 [N, keep].

    Returns
    -------
    detections
        float32 [N, keep, 7]: image index, ymin, xmin, ymax, xmax, score, label; rows that are not
        used are (image index, 0, 0, 0, 0, 0, -1).
    num_detections
        int32 [N].
    """
    found = scores > 0
    rows = torch.cat([boxes[..., [1, 0, 3, 2]], scores[..., None]], dim=2)
    rows = torch.where(found[..., None], rows, 0.0)
    label = torch.where(found, labels.to(rows.dtype), -1.0)[..., None]
    image = torch.arange(rows.shape[0], device=rows.device, dtype=rows.dtype)[:, None, None]
    detections = torch.cat([image.expand(-1, rows.shape[1], 1), rows, label], dim=2)
    return detections, found.sum(dim=1, dtype=torch.int32)


class PostProcess(nn.Module, ABC):
    """Head tensors of all levels to detections.

    Attributes
    ----------
    rules
        Thresholds and caps.
    activation
        ONNX operator that makes scores of logits.
    background
        Whether class 0 is the background, which is not detected.
    anchor_major
        Whether a head's channels are anchor by anchor; otherwise coordinate by coordinate and
        class by class.
    bound
        Largest dw and dh, as exponents; 0: none.
    silent
        Logit of a class that shows nothing, where another class of the prior shows something.
    centre, size
        Of the priors: float32 [2, P], x and y, in fractions of the image.
    """

    rules: ClassVar[Rules]
    activation: ClassVar[str]
    background: ClassVar[bool]
    anchor_major: ClassVar[bool]
    bound: ClassVar[float] = 0.0
    silent: ClassVar[float]
    centre: Tensor
    size: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def decode(self, loc: Tensor) -> Tensor:
        """Deltas [N, 4, P] to boxes [N, P, 4]: ltrb, in fractions of the image, not clipped."""

    @abstractmethod
    def logits(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logits of the one class of a prior that is not `silent`, for its scores."""

    @abstractmethod
    def forward(self, loc: Sequence[Tensor], conf: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode, suppress, sort.

        Parameters
        ----------
        loc, conf
            Head tensors per level, as the network gives them.

        Returns
        -------
        detections
            float32 [N, keep, 7], see `to_rows`.
        num_detections
            int32 [N].
        """

    def join(self, levels: Sequence[Tensor], rows: int) -> Tensor:
        """Head tensors [N, A_i * rows, h_i, w_i] to [N, rows, P]: level, anchor, y, x."""
        return torch.cat([self.flat(level, rows) for level in levels], dim=2)

    def flat(self, level: Tensor, rows: int) -> Tensor:
        """One level's head tensor [N, A * rows, h, w] to [N, rows, A * h * w]."""
        if not self.anchor_major:
            return level.reshape(level.shape[0], rows, -1)
        by_anchor = level.reshape(level.shape[0], level.shape[1] // rows, rows, -1)
        return by_anchor.transpose(1, 2).flatten(2)

    def split(self, joined: Floats) -> list[Floats]:
        """Undo `join`: [N, rows, P] to the head tensors of all levels."""
        batch, rows, _ = joined.shape
        sizes = [anchors * height * width for anchors, height, width in self.config.levels]
        parts = []
        for part, (anchors, height, width) in zip(
            np.split(joined, np.cumsum(sizes)[:-1], axis=2), self.config.levels, strict=True
        ):
            level = part.reshape(batch, rows, anchors, height, width)
            level = level.swapaxes(1, 2) if self.anchor_major else level
            parts.append(np.ascontiguousarray(level.reshape(batch, -1, height, width)))
        return parts

"""Decoding and NMS in PyTorch: head tensors to detections, as NMS_OPT_TRT defines them.

Two steps have no PyTorch operator with the semantics we need: a top-k whose ties go to the lower
index, and greedy NMS over many independent rows. They are custom operators, so that the exporter
can translate each into the one ONNX operator that means it (`onnx_export`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export.config import SSDConfig
from export.default_boxes import VARIANCES, default_boxes

SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5
TOP_K = 200
"""Thresholds and the cap per class (before suppression) and per image; MLCommons ssd_r34.py."""


@torch.library.custom_op("ssd_resnet34::stable_topk", mutates_args=())
def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the `k` largest along the last axis, descending; equal values in index order.

    Returns values and int64 indices, each [..., k].
    """
    top, index = torch.sort(values, dim=-1, descending=True, stable=True)
    return top[..., :k].clone(), index[..., :k].clone()


@stable_topk.register_fake
def _(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*values.shape[:-1], k)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("ssd_resnet34::greedy_nms", mutates_args=())
def greedy_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float
) -> Tensor:
    """Greedy NMS in each of R independent rows of K boxes.

    Parameters
    ----------
    boxes
        float32 [R, K, 4], ltrb.
    scores
        float32 [R, K], descending in each row.
    iou_threshold, score_threshold
        A box is dropped when its IoU with a kept one is larger, or its score is not larger.

    Returns
    -------
    bool [R, K], True where the box is kept.
    """
    keep = scores > score_threshold
    candidates = int(keep.sum(dim=1).amax())  # the first ones of a row; few reach the threshold
    boxes = boxes[:, :candidates]
    lt = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    rb = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    overlap = (rb - lt).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    iou = overlap / (area[:, :, None] + area[:, None, :] - overlap)
    suppresses = iou > iou_threshold  # False for the NaN of two empty boxes
    for i in range(candidates - 1):
        keep[:, i + 1 : candidates] &= ~(keep[:, i, None] & suppresses[:, i, i + 1 :])
    return keep


@greedy_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:  # noqa: ARG001
    return scores.new_empty(scores.shape, dtype=torch.bool)


def join_levels(levels: Sequence[Tensor], rows: int) -> Tensor:
    """Join head tensors [N, rows * A_i, g_i, g_i] over the levels to [N, rows, P]."""
    return torch.cat([level.reshape(level.shape[0], rows, -1) for level in levels], dim=2)


class PostProcess(nn.Module):
    """Head tensors of all levels to detections."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        priors = torch.from_numpy(default_boxes(config)).T.contiguous()
        self.centre: Tensor
        self.size: Tensor
        self.register_buffer("centre", priors[:2], persistent=False)
        self.register_buffer("size", priors[2:], persistent=False)

    def decode(self, loc: Tensor) -> Tensor:
        """Deltas [N, 4, P] to boxes [N, P, 4]: ltrb, normalised, not clipped."""
        centre = loc[:, :2] * VARIANCES[0] * self.size + self.centre
        half = torch.exp(loc[:, 2:] * VARIANCES[2]) * self.size / 2
        return torch.cat([centre - half, centre + half], dim=1).transpose(1, 2)

    def forward(self, loc: Sequence[Tensor], conf: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode, suppress, sort.

        Parameters
        ----------
        loc, conf
            Head tensors per level, see `SSDResNet34.forward`.

        Returns
        -------
        detections
            float32 [N, 200, 7]: image index, ymin, xmin, ymax, xmax, score, label; DESIGN rules.
        num_detections
            int32 [N].
        """
        boxes = self.decode(join_levels(loc, 4))
        logits = join_levels(conf, self.num_classes)
        batch = boxes.shape[0]
        # A NaN or infinite value anywhere voids its prior, not its image.
        valid = boxes.isfinite().all(dim=2) & logits.isfinite().all(dim=1)
        scores = torch.where(valid[:, None], logits.softmax(dim=1)[:, 1:], 0.0)

        scores, index = stable_topk(scores, TOP_K)  # [N, C - 1, TOP_K]; P is never smaller
        boxes = boxes.gather(1, index.reshape(batch, -1, 1).expand(-1, -1, 4))
        keep = greedy_nms(
            boxes.reshape(-1, TOP_K, 4), scores.reshape(-1, TOP_K), IOU_THRESHOLD, SCORE_THRESHOLD
        )

        # Flat order is class, then rank in the class: what ties must follow.
        survivors = torch.where(keep.reshape(batch, -1), scores.reshape(batch, -1), -1.0)
        scores, index = stable_topk(survivors, TOP_K)
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)).clip(0.0, 1.0)
        label = (torch.div(index, TOP_K, rounding_mode="floor") + 1).to(boxes.dtype)
        found = scores > 0
        rows = torch.cat([boxes[..., [1, 0, 3, 2]], scores[..., None]], dim=2)
        rows = torch.where(found[..., None], rows, 0.0)
        image = torch.arange(batch, device=rows.device, dtype=rows.dtype)[:, None, None]
        detections = torch.cat(
            [image.expand(-1, rows.shape[1], 1), rows, torch.where(found, label, -1.0)[..., None]],
            dim=2,
        )
        return detections, found.sum(dim=1, dtype=torch.int32)

"""SSD's decoding and NMS in PyTorch: head tensors to detections, as NMS_OPT_TRT defines them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.postprocess import PostProcess, finite, greedy_nms, stable_topk, to_rows
from export.ssd_resnet34.config import SSDConfig
from export.ssd_resnet34.default_boxes import VARIANCES, default_boxes
from graph_surgery.rounding import Rules

SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5
TOP_K = 200
"""Thresholds and the cap per class (before suppression) and per image; MLCommons ssd_r34.py."""


class SSDPostProcess(PostProcess):
    """Head tensors of all levels to at most 200 detections."""

    rules = Rules(SCORE_THRESHOLD, IOU_THRESHOLD, TOP_K, TOP_K)
    activation = "Softmax"
    background = True
    anchor_major = False
    silent = 0.0

    def __init__(self, config: SSDConfig) -> None:
        super().__init__(config)
        priors = torch.from_numpy(default_boxes(config)).T.contiguous()
        self.register_buffer("centre", priors[:2], persistent=False)
        self.register_buffer("size", priors[2:], persistent=False)

    def decode(self, loc: Tensor) -> Tensor:
        """Deltas [N, 4, P] to boxes [N, P, 4]: ltrb, normalised, not clipped."""
        centre = loc[:, :2] * VARIANCES[0] * self.size + self.centre
        half = torch.exp(loc[:, 2:] * VARIANCES[2]) * self.size / 2
        return torch.cat([centre - half, centre + half], dim=1).transpose(1, 2)

    def logits(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logits whose softmax among logits of 0 are these scores."""
        return np.log(scores / (1 - scores) * (self.config.num_classes - 1))

    def forward(self, loc: Sequence[Tensor], conf: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode, suppress, sort; see `PostProcess.forward`."""
        boxes = self.decode(self.join(loc, 4))
        logits = self.join(conf, self.config.num_classes)
        batch = boxes.shape[0]
        # A NaN or infinite value anywhere voids its prior, not its image.
        valid = finite(boxes, 2) & finite(logits, 1)
        scores = torch.where(valid[:, None], logits.softmax(dim=1)[:, 1:], 0.0)

        scores, index = stable_topk(scores, TOP_K)  # [N, C - 1, TOP_K]; P is never smaller
        boxes = boxes.gather(1, index.reshape(batch, -1, 1).expand(-1, -1, 4))
        keep = greedy_nms(
            boxes.reshape(-1, TOP_K, 4),
            scores.reshape(-1, 1, TOP_K),
            IOU_THRESHOLD,
            SCORE_THRESHOLD,
        )

        # Flat order is class, then rank in the class: what ties must follow.
        survivors = torch.where(keep.reshape(batch, -1), scores.reshape(batch, -1), -1.0)
        scores, index = stable_topk(survivors, TOP_K)
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)).clip(0.0, 1.0)
        return to_rows(boxes, scores, index // TOP_K + 1)

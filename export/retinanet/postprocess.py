"""RetinaNet's decoding and NMS in PyTorch, after torchvision and the MLCommons reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.postprocess import PostProcess, finite, greedy_nms, stable_topk, to_rows
from export.retinanet.anchors import anchors
from export.retinanet.config import KEEP, RetinaNetConfig
from graph_surgery.rounding import Rules

SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5
LEVEL_TOP_K = 1000
"""Thresholds, and the cap of each level over all its classes before suppression."""

LARGEST_STRETCH = math.log(1000 / 16)
"""Upper bound of dw and dh; torchvision's and Detectron's ``bbox_xform_clip``."""


class RetinaNetPostProcess(PostProcess):
    """Head tensors of all levels to at most 300 detections."""

    rules = Rules(SCORE_THRESHOLD, IOU_THRESHOLD, 0, KEEP, LEVEL_TOP_K, clip=True)
    activation = "Sigmoid"
    background = False
    anchor_major = True
    bound = LARGEST_STRETCH
    silent = -10.0

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__(config)
        lt, rb = np.split(anchors(config).T, 2)
        for name, values in (("centre", (lt + rb) / 2), ("size", rb - lt)):
            rows = torch.from_numpy(values.astype(np.float32))
            self.register_buffer(name, rows, persistent=False)

    def decode(self, loc: Tensor) -> Tensor:
        """Deltas [N, 4, P] to boxes [N, P, 4]: ltrb, in fractions of the image, not clipped."""
        centre = loc[:, :2] * self.size + self.centre
        half = torch.exp(loc[:, 2:].clamp(max=LARGEST_STRETCH)) * self.size / 2
        return torch.cat([centre - half, centre + half], dim=1).transpose(1, 2)

    def logits(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logits whose sigmoids are these scores."""
        return np.log(scores / (1 - scores))

    def forward(self, loc: Sequence[Tensor], conf: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Choose in each level, suppress in each class, sort; see `PostProcess.forward`."""
        boxes = self.decode(self.join(loc, 4))
        classes = self.config.num_classes
        first = 0
        chosen: list[tuple[Tensor, Tensor, Tensor]] = []
        for level in conf:
            logits = self.flat(level, classes)
            count = logits.shape[2]
            # A NaN or infinite value anywhere voids its prior, not its image.
            valid = finite(boxes[:, first : first + count], 2) & finite(logits, 1)
            scores = torch.where(valid[:, None], logits.sigmoid(), 0.0).flatten(1)
            best, index = stable_topk(scores, min(LEVEL_TOP_K, scores.shape[1]))
            chosen.append((best, index // count, index % count + first))
            first += count
        scores, labels, priors = (torch.cat(part, dim=1) for part in zip(*chosen, strict=True))
        boxes = boxes.gather(1, priors[..., None].expand(-1, -1, 4)).clip(0.0, 1.0)

        # Spread over the classes: [N, C, M], void where a candidate is of another class.
        rows = torch.arange(classes, device=labels.device)[:, None]
        scores = torch.where(labels[:, None] == rows, scores[:, None], -1.0)
        keep = greedy_nms(boxes, scores, IOU_THRESHOLD, SCORE_THRESHOLD)

        # Flat order is class, level, rank in the level: what ties must follow.
        scores, index = stable_topk(torch.where(keep, scores, -1.0).flatten(1), KEEP)
        count = labels.shape[1]
        boxes = boxes.gather(1, (index % count)[..., None].expand(-1, -1, 4))
        return to_rows(boxes, scores, index // count)

"""RetinaNet with random weights, weights by a formula, and its tail by brute force."""

from __future__ import annotations

import math
import zlib

import numpy as np
import onnx
import torch

from export.onnx_export import Detector, export_detector, without_heads
from export.retinanet.config import RetinaNetConfig
from export.retinanet.model import RetinaNet
from graph_surgery.replace import insert_nms

SMALL = RetinaNetConfig(
    image_height=128,
    image_width=160,
    num_classes=12,
    width=8,
    groups=4,
    group_width=2,
    fpn_channels=16,
)


def random_model(config: RetinaNetConfig) -> RetinaNet:
    """A model whose activations are sane, and which has candidates in every level."""
    torch.manual_seed(1)
    model = RetinaNet(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative average: statistics of the images below
        elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.no_grad():
        for conv in (model.backbone.fpn.extra_blocks.p6, model.backbone.fpn.extra_blocks.p7):
            conv.weight.mul_(2)  # each sees the zeros around a small map
        model.train()(torch.randn(8, 3, *config.image_shape))
        model.head.regression_head.bbox_reg.weight.mul_(0.5)
        model.head.classification_head.cls_logits.weight.mul_(0.6)
    return model.eval()


def surgered() -> onnx.ModelProto:
    """`SMALL` with random weights as ONNX, from the image to NMS_OPT_TRT of version 2."""
    return insert_nms(without_heads(export_detector(Detector(random_model(SMALL)).eval()))).model


def formula_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of a tensor; the golden data's README."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = 0.5 + rng.rand(*shape)
    elif name.endswith("running_mean"):
        values = 0.1 * rng.randn(*shape)
    elif len(shape) > 1:
        values = rng.randn(*shape) * math.sqrt(1.6 / math.prod(shape[1:]))
    elif name.endswith("weight"):
        values = 0.6 + 0.4 * rng.rand(*shape)
    else:
        values = 0.05 * rng.randn(*shape)
    if name.endswith("cls_logits.weight"):
        values = values * 0.1
    return values.astype(np.float32)


def detect(
    boxes: np.ndarray, scores: np.ndarray, levels: list[int]
) -> list[tuple[float, int, int, np.ndarray]]:
    """The tail of an image by the rules, one loop each.

    Boxes float32 [P, 4] ltrb in fractions, not clipped, and scores [C, P] (NaN: void), in the
    operator's order; the result is a list of (score, class, prior, clipped box).
    """
    candidates: list[tuple[float, int, int]] = []
    first = 0
    for count in levels:
        labels, priors = np.nonzero(scores[:, first : first + count] > np.float32(0.05))
        passing = [
            (-float(scores[label, prior]), int(label), int(prior))
            for label, prior in zip(labels, priors + first, strict=True)
        ]
        candidates += sorted(passing)[:1000]
        first += count
    clipped = boxes.clip(0, 1)
    kept: list[tuple[float, int, int]] = []
    for one in sorted(candidates):
        rivals = [other for other in kept if other[1] == one[1]]
        if not any(iou(clipped[one[2]], clipped[other[2]]) > 0.5 for other in rivals):
            kept.append(one)
    return [(-score, label, prior, clipped[prior]) for score, label, prior in kept[:300]]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU in float64 of two boxes, ltrb; 0 where one has no area."""
    a, b = a.astype(float), b.astype(float)
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (areas - w * h)

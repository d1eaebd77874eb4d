"""Head tensors to measure with: golden images, noise on each copy, in a type and a layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugin_cuda.binding import Plan, prepare
from plugin_cuda.errors import PluginError

LEVELS = ((4, 50, 50), (6, 25, 25), (6, 13, 13), (6, 7, 7), (4, 3, 3), (4, 3, 3))
"""Anchors, height and width of SSD-ResNet34's maps at 1200x1200."""

NUM_CLASSES, TOP_K, KEEP_TOP_K = 81, 200, 200
CONFIDENCE_THRESHOLD, NMS_THRESHOLD = 0.05, 0.5
VARIANCES = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class Detector:
    """Heads of a network, and how NMS_OPT_TRT runs on them.

    Attributes
    ----------
    name
        As ``--detector`` has it.
    levels
        Anchors, height and width of each map.
    num_classes
        C, with background.
    options
        Of `prepare`, besides.
    cases
        Name of a load to its file among the golden data.
    batches
        What is measured.
    """

    name: str
    levels: tuple[tuple[int, int, int], ...]
    num_classes: int
    options: Mapping[str, Any]
    cases: Mapping[str, str]
    batches: tuple[int, ...]


SSD_RESNET34 = Detector(
    "ssd-resnet34",
    LEVELS,
    NUM_CLASSES,
    {"background_class": 0, "top_k": TOP_K, "keep_top_k": KEEP_TOP_K},
    {"2,500 candidates": "nms_1.npz", "15,000 candidates": "nms_3.npz"},
    (1, 8, 64, 256),
)

LEVEL_TOP_K = 1000
STRETCH = math.log(1000 / 16)

RETINANET = Detector(
    "retinanet",
    tuple((9, size, size) for size in (100, 50, 25, 13, 7)),
    264,
    {
        "background_class": -1,
        "sigmoid": 1,
        "level_top_k": LEVEL_TOP_K,
        "top_k": 5 * LEVEL_TOP_K,
        "keep_top_k": 300,
        "clip_before_nms": True,
        "bbox_xform_clip": STRETCH,
    },
    {"4,400 candidates": "retinanet/tail_800.npz"},
    (1, 8, 64),
)
"""MLPerf's, at 800x800."""

DETECTORS = {one.name: one for one in (SSD_RESNET34, RETINANET)}

ROTATED_BYTES = 100_000_000
"""Inputs in turn take at least this much: twice the L2 cache of an H100, 50 MB."""

NOISE = 0.02
"""Standard deviation of what is added to every delta and logit."""


@dataclass(frozen=True)
class Form:
    """Type and layout of the heads.

    Attributes
    ----------
    dtype
        Of conf: float32, float16 or int8, with which loc is float16.
    layout
        NCHW, or NHWC with rows of conf padded to whole 16 bytes.
    """

    dtype: str
    layout: str

    @property
    def loc_dtype(self) -> str:
        """Type of loc."""
        return "float16" if self.dtype == "int8" else self.dtype


FORMS = (
    Form("float32", "NCHW"),
    Form("float16", "NCHW"),
    Form("float16", "NHWC"),
    Form("int8", "NHWC"),
)


@dataclass(frozen=True)
class Golden:
    """One image: joined deltas [4, P] and logits [C, P], float32, on the GPU."""

    detector: Detector
    loc: Any
    conf: Any


@dataclass(frozen=True)
class HeadSet:
    """Head tensors of a batch, on the GPU, and the scales of int8 conf."""

    detector: Detector
    loc: list[Any]
    conf: list[Any]
    scales: list[float] | None

    def plan(self, priors: Any) -> Plan:
        """Prepare a run on them."""
        return prepare(
            self.loc,
            self.conf,
            priors,
            num_classes=self.detector.num_classes,
            confidence_threshold=CONFIDENCE_THRESHOLD,
            nms_threshold=NMS_THRESHOLD,
            conf_scales=self.scales,
            **self.detector.options,
        )


def load_priors(folder: Path, detector: Detector) -> Any:
    """Priors tensor float32 [2, P * 4] on the GPU."""
    import torch

    if detector is RETINANET:  # pixels, by cell, then anchor
        anchors = _read(folder / "retinanet" / "anchors.npz")["a_800x800"] / 800
        ends = np.cumsum([a * h * w for a, h, w in detector.levels])[:-1]
        parts = [part.reshape(-1, 9, 4).transpose(1, 0, 2) for part in np.split(anchors, ends)]
        corners = np.concatenate([part.reshape(-1, 4) for part in parts])
        variances = np.ones_like(corners)
    else:
        corners = _read(folder / "default_boxes.npz")["ltrb"]
        variances = np.broadcast_to(VARIANCES, corners.shape)
    planes = np.stack([corners, variances]).astype(np.float32)
    return torch.from_numpy(planes.reshape(2, -1)).cuda()


def load_golden(folder: Path, detector: Detector, case: str) -> Golden:
    """Read one of a detector's cases."""
    import torch

    file = _read(folder / detector.cases[case])
    read = _sparse if detector is RETINANET else lambda file, name: file[name]
    found = (read(file, name) for name in ("loc", "conf"))
    return Golden(detector, *(torch.from_numpy(one).cuda().float() for one in found))


def _sparse(file: Any, name: str) -> NDArray[np.float32]:
    """Join RetinaNet's heads [1, 9 * R, h, w], channels by anchor, which a file has as sparse."""
    prefix = {"loc": "reg", "conf": "cls"}[name]
    parts = []
    for level in ("p3", "p4", "p5", "p6", "p7"):
        shape = file[f"{prefix}_{level}_shape"]
        head = np.full(int(np.prod(shape)), file[f"{prefix}_fill"], np.float32)
        head[file[f"{prefix}_{level}_idx"]] = file[f"{prefix}_{level}_val"]
        rows = head.reshape(9, int(shape[1]) // 9, -1)
        parts.append(rows.transpose(1, 0, 2).reshape(len(rows[0]), -1))
    return np.concatenate(parts, axis=1)


def _read(path: Path) -> Any:
    try:
        return np.load(path)
    except OSError as error:
        raise PluginError(f"cannot read golden data: {error}; see --golden") from error


def make_set(golden: Golden, form: Form, batch: int, seed: int) -> HeadSet:
    """Copy an image `batch` times, every copy with noise of its own."""
    import torch

    torch.manual_seed(seed)
    loc = golden.loc + NOISE * torch.randn((batch, *golden.loc.shape), device="cuda")
    conf = golden.conf + NOISE * torch.randn((batch, *golden.conf.shape), device="cuda")
    detector = golden.detector
    sizes = [anchors * height * width for anchors, height, width in detector.levels]
    locs = _layout(loc.to(getattr(torch, form.loc_dtype)).split(sizes, dim=2), form, detector)
    parts = conf.split(sizes, dim=2)
    if form.dtype != "int8":
        dtype = getattr(torch, form.dtype)
        confs = _layout([part.to(dtype) for part in parts], form, detector)
        return HeadSet(detector, locs, confs, None)
    scales = [part.abs().max().item() / 127 for part in parts]
    steps = [(p / s).round().to(torch.int8) for p, s in zip(parts, scales, strict=True)]
    return HeadSet(detector, locs, _layout(steps, form, detector), scales)


def _layout(parts: Any, form: Form, detector: Detector) -> list[Any]:
    """Joined tensors [N, rows, A * h * w] of the levels to heads [N, rows * A, h, w]."""
    heads = []
    for part, (_, height, width) in zip(parts, detector.levels, strict=True):
        head = part.contiguous().reshape(len(part), -1, height, width)
        if form.layout == "NHWC":
            channels = head.shape[1]
            step = 16 // head.element_size()
            rows = head.new_zeros((len(head), height, width, -(-channels // step) * step))
            rows[..., :channels] = head.permute(0, 2, 3, 1)
            head = rows[..., :channels].permute(0, 3, 1, 2)
        heads.append(head)
    return heads


def head_bytes(detector: Detector, form: Form, batch: int) -> int:
    """Bytes of the head tensors, padding left out: what has to be read at least once."""
    priors = sum(anchors * height * width for anchors, height, width in detector.levels)
    sizes = {"float32": 4, "float16": 2, "int8": 1}
    return batch * priors * (4 * sizes[form.loc_dtype] + detector.num_classes * sizes[form.dtype])


def num_sets(detector: Detector, form: Form, batch: int) -> int:
    """How many sets in turn make sure that none of them is left in the L2 cache."""
    return max(2, -(-ROTATED_BYTES // head_bytes(detector, form, batch)))


def candidates(golden: Golden) -> int:
    """Count the scores of foreground classes above the threshold."""
    retinanet = golden.detector is RETINANET
    scores = golden.conf.sigmoid() if retinanet else golden.conf.softmax(0)[1:]
    return int((scores > CONFIDENCE_THRESHOLD).sum())

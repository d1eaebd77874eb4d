"""Head tensors to measure with: golden images, noise on each copy, in a type and a layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plugin_cuda.binding import Plan, prepare
from plugin_cuda.errors import PluginError

LEVELS = ((4, 50, 50), (6, 25, 25), (6, 13, 13), (6, 7, 7), (4, 3, 3), (4, 3, 3))
"""Anchors, height and width of SSD-ResNet34's maps at 1200x1200."""

NUM_CLASSES, TOP_K, KEEP_TOP_K = 81, 200, 200
CONFIDENCE_THRESHOLD, NMS_THRESHOLD = 0.05, 0.5
VARIANCES = (0.1, 0.1, 0.2, 0.2)

CASES = {"2,500 candidates": "nms_1.npz", "15,000 candidates": "nms_3.npz"}

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

    loc: Any
    conf: Any


@dataclass(frozen=True)
class HeadSet:
    """Head tensors of a batch, on the GPU, and the scales of int8 conf."""

    loc: list[Any]
    conf: list[Any]
    scales: list[float] | None

    def plan(self, priors: Any) -> Plan:
        """Prepare a run on them."""
        return prepare(
            self.loc,
            self.conf,
            priors,
            num_classes=NUM_CLASSES,
            background_class=0,
            top_k=TOP_K,
            keep_top_k=KEEP_TOP_K,
            confidence_threshold=CONFIDENCE_THRESHOLD,
            nms_threshold=NMS_THRESHOLD,
            conf_scales=self.scales,
        )


def load_priors(folder: Path) -> Any:
    """Priors tensor float32 [2, P * 4] on the GPU."""
    import torch

    corners = _read(folder / "default_boxes.npz")["ltrb"]
    planes = np.stack([corners, np.broadcast_to(VARIANCES, corners.shape)]).astype(np.float32)
    return torch.from_numpy(planes.reshape(2, -1)).cuda()


def load_golden(folder: Path, case: str) -> Golden:
    """Read one of `CASES`."""
    import torch

    file = _read(folder / CASES[case])
    return Golden(*(torch.from_numpy(file[name]).cuda().float() for name in ("loc", "conf")))


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
    sizes = [anchors * height * width for anchors, height, width in LEVELS]
    locs = _layout(loc.to(getattr(torch, form.loc_dtype)).split(sizes, dim=2), form)
    parts = conf.split(sizes, dim=2)
    if form.dtype != "int8":
        dtype = getattr(torch, form.dtype)
        return HeadSet(locs, _layout([part.to(dtype) for part in parts], form), None)
    scales = [part.abs().max().item() / 127 for part in parts]
    steps = [(p / s).round().to(torch.int8) for p, s in zip(parts, scales, strict=True)]
    return HeadSet(locs, _layout(steps, form), scales)


def _layout(parts: Any, form: Form) -> list[Any]:
    """Joined tensors [N, rows, A * h * w] of the levels to heads [N, rows * A, h, w]."""
    heads = []
    for part, (_, height, width) in zip(parts, LEVELS, strict=True):
        head = part.contiguous().reshape(len(part), -1, height, width)
        if form.layout == "NHWC":
            channels = head.shape[1]
            step = 16 // head.element_size()
            rows = head.new_zeros((len(head), height, width, -(-channels // step) * step))
            rows[..., :channels] = head.permute(0, 2, 3, 1)
            head = rows[..., :channels].permute(0, 3, 1, 2)
        heads.append(head)
    return heads


def head_bytes(form: Form, batch: int) -> int:
    """Bytes of the head tensors, padding left out: what has to be read at least once."""
    priors = sum(anchors * height * width for anchors, height, width in LEVELS)
    sizes = {"float32": 4, "float16": 2, "int8": 1}
    return batch * priors * (4 * sizes[form.loc_dtype] + NUM_CLASSES * sizes[form.dtype])


def num_sets(form: Form, batch: int) -> int:
    """How many sets in turn make sure that none of them is left in the L2 cache."""
    return max(2, -(-ROTATED_BYTES // head_bytes(form, batch)))


def candidates(golden: Golden) -> int:
    """Count the scores of foreground classes above the threshold."""
    return int((golden.conf.softmax(0)[1:] > CONFIDENCE_THRESHOLD).sum())

"""Head tensors on a GPU, in every layout of nms_opt_format, and runs of libnms_opt.so on them."""

from dataclasses import dataclass

import numpy as np
import torch

from plugin_cuda.binding import Plan
from plugin_cuda.library import FLOAT16, FLOAT32, INT8, Config, Format, Level
from tests.support.nms_cases import make_model, run
from tests.support.nms_tolerance import check_same, undecided

DEVICE = "cuda"
CODES = {"float32": FLOAT32, "float16": FLOAT16, "int8": INT8}
GARBAGE = 0xFF
"""Bytes of padding, outputs and workspace before a run: NaN as a float, -1 as an integer."""


@dataclass(frozen=True)
class Form:
    """Element types and layout of the heads: nchw, nhwc, padded, merged, or chw2 to chw32."""

    layout: str
    conf: str
    loc: str

    def vector(self, channels):
        """`vector` of nms_opt_format; `padded` is NHWC with rows of whole 16 bytes and more."""
        if self.layout == "padded":
            return (channels // 8 + 1) * 8
        return {"nchw": 1, "nhwc": channels}.get(self.layout) or int(self.layout[3:])

    def __str__(self):
        return f"{self.layout}-{self.conf}"


FORMS = [
    *(Form(layout, "float32", "float32") for layout in ("nchw", "nhwc", "padded", "chw4", "chw32")),
    *(Form(layout, "float16", "float16") for layout in ("nchw", "nhwc", "padded", "chw2", "chw16")),
    Form("chw32", "float16", "float16"),
    Form("merged", "float16", "float16"),
    Form("merged", "float32", "float32"),
    Form("nchw", "int8", "float32"),
    Form("nhwc", "int8", "float16"),
    Form("padded", "int8", "float16"),
    Form("chw4", "int8", "float32"),
    Form("chw32", "int8", "float16"),
]
NCHW = FORMS[0]
HALF = Form("nchw", "float16", "float16")


def split(joined, levels):
    """Joined head tensors [N, rows, P] to those of the levels [N, rows * A, h, w]."""
    ends = np.cumsum([a * h * w for a, h, w in levels])[:-1]
    parts = np.split(joined, ends, axis=2)
    return [
        np.ascontiguousarray(part).reshape(len(joined), -1, h, w)
        for part, (_, h, w) in zip(parts, levels, strict=True)
    ]


def pack(head, vector):
    """Lay out [N, C, h, w] as nms_opt_format says, the padding filled with garbage."""
    batch, channels, height, width = head.shape
    rows = -(-channels // vector)
    stored = np.full((batch, rows * vector, height * width), GARBAGE, np.uint8)
    stored = np.repeat(stored, head.itemsize, axis=2).view(head.dtype)
    stored[:, :channels] = head.reshape(batch, channels, -1)
    grouped = stored.reshape(batch, rows, vector, height * width)
    return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2))


def upload(array, shift=0):
    """Copy an array to the GPU, as bytes, `shift` bytes behind an aligned address."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = torch.empty(len(flat) + shift, dtype=torch.uint8, device=DEVICE)[shift:]
    return buffer.copy_(torch.from_numpy(flat.copy()))


class Heads:
    """A case, (levels, priors, loc [N, 4, P], conf [N, C, P]), on the GPU in a form."""

    def __init__(self, case, form=NCHW, *, scales=None, shifted=False):
        levels, priors, loc, conf = case
        assert conf.dtype == form.conf
        self.batch, self.buffers, self.levels = len(loc), [], []
        self.loc, self.conf = [], []
        self.priors = upload(np.float32(priors))
        parts = zip(split(loc.astype(form.loc), levels), split(conf, levels), strict=True)
        for i, ((a, h, w), (loc_part, conf_part)) in enumerate(zip(levels, parts, strict=True)):
            if form.layout == "merged":
                merged = np.concatenate([loc_part, conf_part], axis=1)
                row = (merged.shape[1] // 8 + 1) * 8
                self._add(pack(merged, row), shifted)
                address = self.buffers[-1].data_ptr()
                self.loc.append(address)
                self.conf.append(address + loc_part.shape[1] * merged.itemsize)
                vectors = row, row
            else:
                vectors = tuple(form.vector(part.shape[1]) for part in (loc_part, conf_part))
                for part, vector, addresses in zip(
                    (loc_part, conf_part), vectors, (self.loc, self.conf), strict=True
                ):
                    self._add(pack(part, vector), shifted)
                    addresses.append(self.buffers[-1].data_ptr())
            self.levels.append(
                Level(
                    h,
                    w,
                    a,
                    Format(CODES[form.loc], vectors[0]),
                    Format(CODES[form.conf], vectors[1], 1.0 if scales is None else scales[i]),
                )
            )

    def _add(self, packed, shifted):
        self.buffers.append(upload(packed, packed.itemsize if shifted else 0))

    def plan(self, attributes):
        """Make the plan of a run with NmsAttributes."""
        config = Config(
            num_classes=attributes.numClasses,
            background_class=attributes.backgroundLabelId,
            top_k=attributes.topK,
            keep_top_k=attributes.keepTopK,
            confidence_threshold=attributes.confidenceThreshold,
            nms_threshold=attributes.nmsThreshold,
            levels=tuple(self.levels),
            sigmoid=attributes.confSigmoid,
            level_top_k=attributes.levelTopK,
            clip_before_nms=attributes.clipBeforeNms,
            bbox_xform_clip=attributes.bboxXformClip,
        )
        owners = (self.priors, *self.buffers)
        address = self.priors.data_ptr()
        return Plan(config, self.batch, tuple(self.loc), tuple(self.conf), address, owners=owners)


def quantize(conf, levels):
    """Logits as int8, a scale for each level, and the real values that they stand for."""
    ends = np.cumsum([a * h * w for a, h, w in levels])[:-1]
    parts = np.split(conf, ends, axis=2)
    scales = [np.float32(max(np.abs(part).max(), 1e-3) / 127) for part in parts]
    steps = [np.round(part / s).astype(np.int8) for part, s in zip(parts, scales, strict=True)]
    real = [np.float32(part) * s for part, s in zip(steps, scales, strict=True)]
    return np.concatenate(steps, axis=2), scales, np.concatenate(real, axis=2)


def in_form(form, case):
    """Heads on the GPU, and the case with the values that the kernel then sees, as float32."""
    levels, priors, loc, conf = case
    loc = loc.astype(form.loc)
    scales = None
    if form.conf == "int8":
        stored, scales, real = quantize(np.float32(conf), levels)
    else:
        stored = conf.astype(form.conf)
        real = np.float32(stored)
    heads = Heads((levels, priors, loc, stored), form, scales=scales)
    return heads, (levels, priors, np.float32(loc), real)


class Bound:
    """A plan with outputs and workspace of its own, filled with garbage or left as allocated."""

    def __init__(self, plan, garbage=GARBAGE, *, spoiled=True):
        shape = (plan.batch, plan.config.keep_top_k, 28)
        self.detections = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
        self.count = torch.empty(plan.batch * 4, dtype=torch.uint8, device=DEVICE)
        self.workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=DEVICE)
        if spoiled:
            self.spoil(garbage)
        self.detections = self.detections.view(torch.float32)
        self.count = self.count.view(torch.int32)
        self.run = plan.bind(self.detections, self.count, self.workspace)

    def spoil(self, garbage):
        """Overwrite outputs and workspace with a byte, or with random ones for None."""
        for tensor in (self.detections, self.count, self.workspace):
            data = tensor.view(torch.uint8)
            if garbage is None:
                data.random_(256)
            else:
                data.fill_(garbage)

    def __call__(self, stream=None):
        stream = stream or torch.cuda.current_stream()
        self.run(stream.cuda_stream)
        return self

    def result(self):
        """(detections, num_detections) of the last run, waited for."""
        torch.cuda.synchronize()
        return self.detections.cpu().numpy(), self.count.cpu().numpy()


def run_kernel(attributes, heads, garbage=GARBAGE):
    """(detections, num_detections) of one run."""
    return Bound(heads.plan(attributes), garbage)().result()


def check_against_definition(attributes, case, form=NCHW):
    """Compare with ONNX Runtime on the values that the kernel sees; return the kernel's result."""
    heads, (levels, priors, loc, conf) = in_form(form, case)
    actual = run_kernel(attributes, heads)
    expected = run(make_model(attributes, levels, priors), levels, loc, conf)
    check_same(actual, expected, lambda n: undecided(loc[n], conf[n], priors, attributes, levels))
    return actual

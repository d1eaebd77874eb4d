"""How exporters write detectors: the slots of a grammar, and what may stand in each."""

from __future__ import annotations

from dataclasses import dataclass

FORMS = {
    "opset": (11, 12, 13, 15, 17, 18, 21, 23),
    "image": ("NCHW", "NHWC", "NHWC, turned later"),
    "stem": ("plain", "normalised", "scaled"),
    "norm": ("none", "plain", "behind Identity"),
    "active": ("Relu", "Clip", "LeakyRelu", "PRelu"),
    "block": ("none", "residual", "depthwise", "MaxPool"),
    "weights": ("stored", "Constant", "Identity", "shared"),
    "channels": ("coordinate first", "anchor first"),
    "priors": ("by anchor", "by cell"),
    "deltas": ("dx, dy", "dy, dx"),
    "flat": ("arithmetic", "constant", "zero", "NHWC", "rows", "Flatten", "nested"),
    "levels": (2, 1),
    "softmax": ("axis 1", "axis 2", "2-D", "written out", "LogSoftmax", "Sigmoid"),
    "background": ("Slice", "Gather", "Split", "masked", "none"),
    "decode": ("Split", "Slice", "Gather", "Div", "one scale", "premultiplied", "Pow", "clamped"),
    "corners": ("ltrb", "yxyx", "centre"),
    "nms": ("by class", "batched", "best class"),
    "column": ("Gather", "Slice", "Split"),
    "score": ("flat", "GatherND"),
    "keep": ("ReduceMin", "Min"),
    "label": ("Add", "table", "int32", "gaps"),
    "output": ("batch", "flat"),
    "beside": ("nothing", "input", "strings", "scalar", "features", "NonZero"),
}
"""Slots, and the forms that may stand there, the plain one first."""

REFUSED = {
    ("stem", "scaled"): "normalises its images",
    ("decode", "clamped"): "CENTER_SIZE",
    ("nms", "batched"): "offset",
    ("nms", "best class"): "best class",
    ("label", "gaps"): "label",
}
"""Forms that NMS_OPT_TRT has no equal for, and a part of the line that says so."""

MUST = tuple((s, f) for s, forms in FORMS.items() for f in forms if (s, f) not in REFUSED)
"""Forms that must come through."""


@dataclass(frozen=True)
class Habits:
    """A form for every slot of `FORMS`."""

    opset: int = 17
    image: str = "NCHW"
    stem: str = "plain"
    norm: str = "none"
    active: str = "Relu"
    block: str = "none"
    weights: str = "stored"
    channels: str = "coordinate first"
    priors: str = "by anchor"
    deltas: str = "dx, dy"
    flat: str = "arithmetic"
    levels: int = 2
    softmax: str = "axis 2"
    background: str = "Slice"
    decode: str = "Split"
    corners: str = "ltrb"
    nms: str = "by class"
    column: str = "Gather"
    score: str = "flat"
    keep: str = "ReduceMin"
    label: str = "Add"
    output: str = "batch"
    beside: str = "nothing"
    half: bool = False  # the network in float16

    @property
    def offset(self) -> int:
        """Label of the first class whose scores are read."""
        return int(self.background not in ("masked", "none"))

    @property
    def refused(self) -> list[str]:
        """What the line of a refusal may say; empty where the graph must come through."""
        return [text for (slot, form), text in REFUSED.items() if getattr(self, slot) == form]

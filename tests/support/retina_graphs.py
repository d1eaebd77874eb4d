"""Small RetinaNets written by hand as ONNX, with the postprocessing of torchvision's exports.

After the description of the official resnext50_32x4d_fpn.onnx: opset 13, traced with one image of
fixed size, outputs boxes, scores, labels; grouped convolutions, an FPN that upsamples to the
nearest, heads whose weights all levels share; per level sigmoid, threshold, TopK, decoding with a
bound and a clip; one NonMaxSuppression, of boxes moved apart by their labels, within an If.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.support.graphs import Builder

ANCHORS = 3
STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Retina:
    """One way to write the detector, or to get it wrong."""

    height: int = 96
    width: int = 64
    classes: int = 5
    most: int = 40
    each: tuple[int, ...] = ()  # the cut of each level, where it is not `most`
    most_of_all: int = 0  # a cut over all levels behind that of each; 0: none
    keep: int = 30
    threshold: float = 0.1
    overlap: float = 0.45
    bound: float = 1.25  # of dw and dh; 0: none
    clip: bool = True
    variances: tuple[float, float] = (1.0, 1.0)  # of dx, dy and of dw, dh
    offset: bool = True  # classes told apart by an offset, in an If; else scores of each class
    pixels: bool = True
    label: int = 0  # of the first class
    twist: str = ""  # something that NMS_OPT_TRT does not do

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each level."""
        return [(-(-self.height // s), -(-self.width // s)) for s in STRIDES]

    def anchors(self) -> list[np.ndarray]:
        """Of each level float32 [h * w * ANCHORS, 4], ltrb in pixels, by cell, then anchor."""
        found = []
        for (rows, columns), stride in zip(self.grids, STRIDES, strict=True):
            centre = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) * stride
            sizes = np.float32([[2.0, 2.0], [3.1, 1.4], [1.3, 2.9]]) * stride
            corners = np.concatenate([-sizes / 2, sizes / 2], axis=1)
            both = np.concatenate([centre, centre], axis=-1)
            found.append((both[:, :, None] + corners).reshape(-1, 4).astype(np.float32))
        return found


def retina(kind: Retina = Retina(), seed: int = 0) -> onnx.ModelProto:
    """Image [1, 3, height, width] to boxes [n, 4], scores [n], labels [n]."""
    b, rng = Builder(13), np.random.default_rng(seed)

    def weights(cin: int, cout: int, size: int = 3, gain: float = 1.5, bias: float = 0.0):
        values = rng.normal(0, gain / np.sqrt(cin * size * size), (cout, cin, size, size))
        return b.floats(values), b.floats(np.full(cout, bias))

    def conv(x: str, held, size: int = 3, stride: int = 1, group: int = 1) -> str:
        pad = [size // 2] * 4
        return b.op(
            "Conv", x, *held, kernel_shape=[size] * 2, strides=[stride] * 2, pads=pad, group=group
        )

    def grouped(x: str, stride: int) -> str:
        inner = b.op("Relu", conv(x, weights(16, 16, 1), 1))
        inner = b.op("Relu", conv(inner, weights(4, 16), stride=stride, group=4))
        outer = conv(inner, weights(16, 16, 1), 1)
        return b.op("Relu", b.op("Add", outer, conv(x, weights(16, 16, 1), 1, stride)))

    x = b.op("Relu", conv("images", weights(3, 16), stride=4))
    maps = []
    for _ in STRIDES:
        x = grouped(x, 2)
        maps.append(x)
    tops, above = [], ""
    for index in reversed(range(len(maps))):
        side = conv(maps[index], weights(16, 16, 1), 1)
        if above:
            sizes = b.const([1, 16, *kind.grids[index]])
            form = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
            wide = b.op("Resize", above, "", "", sizes, nearest_mode="floor", **form)
            side = b.op("Add", side, wide)
        above = side
        tops.insert(0, conv(side, weights(16, 16)))
    inner_cls, inner_reg = weights(16, 16), weights(16, 16)
    last_cls = weights(16, ANCHORS * kind.classes, gain=2.0, bias=-2.5)
    last_reg = weights(16, ANCHORS * 4, gain=0.6)
    heads = []
    for inner, last, rows in ((inner_cls, last_cls, kind.classes), (inner_reg, last_reg, 4)):
        parts = []
        for top, grid in zip(tops, kind.grids, strict=True):
            head = conv(b.op("Relu", conv(top, inner)), last)
            split = b.op("Reshape", head, b.const([1, ANCHORS, rows, *grid]))
            turned = b.op("Transpose", split, perm=[0, 3, 4, 1, 2])
            parts.append(b.op("Reshape", turned, b.const([1, -1, rows])))
        heads.append(b.op("Concat", *parts, axis=1))
    outputs = _tail(b, kind, *heads)
    for name, made in zip(("boxes", "scores", "labels"), outputs, strict=True):
        b.nodes.append(helper.make_node("Identity", [made], [name]))
    size = [1, 3, kind.height, kind.width]
    types = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64)
    graph = helper.make_graph(
        b.nodes,
        "retina",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, size)],
        [
            helper.make_tensor_value_info(name, one, ["n", 4] if name == "boxes" else ["n"])
            for name, one in zip(("boxes", "scores", "labels"), types, strict=True)
        ],
        b.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.checker.check_model(model, full_check=True)
    return model


def _tail(b: Builder, kind: Retina, cls: str, reg: str) -> list[str]:
    anchors = kind.anchors()
    if not kind.pixels:
        anchors = [part / np.float32([kind.width, kind.height] * 2) for part in anchors]
    ends = np.cumsum([len(part) for part in anchors])
    parts: list[list[str]] = [[], [], []]
    cuts = kind.each or [kind.most] * len(anchors)
    for start, end, own, most in zip([0, *ends[:-1]], ends, anchors, cuts, strict=True):
        heads = [b.squeeze(b.columns(joined, int(start), int(end), 1), 0) for joined in (cls, reg)]
        for part, made in zip(parts, _level(b, kind, heads, own, most), strict=True):
            part.append(made)
    boxes, scores, labels = (b.op("Concat", *part, axis=0) for part in parts)
    if kind.most_of_all:
        count = b.op("Min", b.const([kind.most_of_all]), b.op("Shape", scores))
        scores, rank = b.op("TopK", scores, count, outputs=2, axis=0)
        boxes, labels = (b.op("Gather", one, rank, axis=0) for one in (boxes, labels))
    keep = b.columns(_suppressed(b, kind, boxes, scores, labels), 0, kind.keep, 0)
    labels = b.op("Add", labels, b.const(kind.label)) if kind.label else labels
    return [b.op("Gather", one, keep, axis=0) for one in (boxes, scores, labels)]


def _level(b: Builder, kind: Retina, heads: list[str], anchors: np.ndarray, most: int) -> list[str]:
    """Boxes, scores and labels of the candidates of one level, of its logits and deltas."""
    logits, deltas = heads
    activation = "HardSigmoid" if kind.twist == "other scores" else "Sigmoid"
    flat = b.op("Reshape", b.op(activation, logits), b.const([-1]))
    above = b.op("NonZero", b.op("Greater", flat, b.floats(kind.threshold)))
    index = b.squeeze(above, 0)
    scores = b.op("Gather", flat, index, axis=0)
    count = b.op("Min", b.const([most]), b.op("Shape", scores))
    best, rank = b.op("TopK", scores, count, outputs=2, axis=0)
    chosen = b.op("Gather", index, rank, axis=0)
    place = b.op("Div", chosen, b.const(kind.classes))
    label = b.op("Mod", chosen, b.const(kind.classes))
    move = b.op("Gather", deltas, place, axis=0)
    corners = b.op("Gather", b.floats(anchors), place, axis=0)
    lt, rb = (b.columns(corners, i, i + 2, 1) for i in (0, 2))
    size = b.op("Sub", rb, lt)
    centre = b.op("Add", lt, b.op("Mul", size, b.floats(0.5)))
    shift, stretch = (
        b.op("Mul", b.columns(move, i, i + 2, 1), b.floats(variance))
        for i, variance in zip((0, 2), kind.variances, strict=True)
    )
    if kind.bound:
        stretch = b.op("Clip", stretch, "", b.floats(kind.bound))
    if kind.twist == "bounded below":
        stretch = b.op("Clip", stretch, b.floats(-0.5))
    centre = b.op("Add", b.op("Mul", shift, size), centre)
    half = b.op("Mul", b.op("Mul", b.op("Exp", stretch), size), b.floats(0.5))
    boxes = b.op("Concat", b.op("Sub", centre, half), b.op("Add", centre, half), axis=1)
    if kind.clip:
        far = [kind.width, kind.height] * 2 if kind.pixels else [1] * 4
        boxes = b.op("Min", b.op("Max", boxes, b.floats(0)), b.floats(far))
    if kind.twist == "small boxes dropped":
        best = b.op("Where", _large(b, boxes), best, b.floats(0))
    return [boxes, best, label]


def _large(b: Builder, boxes: str) -> str:
    sides = b.op("Sub", b.columns(boxes, 2, 4, 1), b.columns(boxes, 0, 2, 1))
    least = b.op("ReduceMin", sides, axes=[1], keepdims=0)
    return b.op("Greater", least, b.floats(4))


def _suppressed(b: Builder, kind: Retina, boxes: str, scores: str, labels: str) -> str:
    """Indices of what survives, by descending score."""
    column = b.const([2])
    if kind.offset:
        inner = [
            helper.make_node("ReduceMax", [boxes], ["largest"], keepdims=0),
            helper.make_node("Constant", [], ["more"], value_float=1.0),
            helper.make_node("Add", ["largest", "more"], ["step"]),
            helper.make_node("Cast", [labels], ["labels_f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["labels_f", "step"], ["offsets"]),
            helper.make_node("Constant", [], ["one"], value_ints=[1]),
            helper.make_node("Unsqueeze", ["offsets", "one"], ["offset_column"]),
            helper.make_node("Add", [boxes, "offset_column"], ["apart"]),
            helper.make_node("Constant", [], ["first"], value_ints=[0]),
            helper.make_node("Unsqueeze", ["apart", "first"], ["nms_boxes"]),
            helper.make_node("Constant", [], ["both"], value_ints=[0, 1]),
            helper.make_node("Unsqueeze", [scores, "both"], ["nms_scores"]),
            helper.make_node("Constant", [], ["all"], value_ints=[2**63 - 1]),
            helper.make_node("Constant", [], ["overlap"], value_floats=[kind.overlap]),
            helper.make_node(
                "NonMaxSuppression", ["nms_boxes", "nms_scores", "all", "overlap"], ["selected"]
            ),
            helper.make_node("Gather", ["selected", column], ["kept_column"], axis=1),
            helper.make_node("Squeeze", ["kept_column", "one"], ["kept"]),
        ]
        empty = helper.make_tensor("nothing", TensorProto.INT64, [0], [])
        nothing = [helper.make_node("Constant", [], ["none"], value=empty)]
        branches = {
            name: helper.make_graph(
                nodes, name, [], [helper.make_tensor_value_info(made, TensorProto.INT64, ["n"])]
            )
            for name, nodes, made in (
                ("then_branch", nothing, "none"),
                ("else_branch", inner, "kept"),
            )
        }
        size = b.op("ReduceProd", b.op("Shape", boxes), keepdims=0)
        return b.op("If", b.op("Equal", size, b.const(0)), **branches)
    label_row = b.op("Unsqueeze", labels, b.const([0, 1]))
    classes = b.const(np.arange(kind.classes).reshape(1, -1, 1))
    own = b.op("Equal", label_row, classes)
    score_row = b.op("Unsqueeze", scores, b.const([0, 1]))
    spread = b.op("Where", own, score_row, b.floats(-1))
    cap = b.const([2**31 - 1])
    selected = b.op(
        "NonMaxSuppression",
        b.unsqueeze(boxes, 0),
        spread,
        cap,
        b.floats([kind.overlap]),
        b.floats([kind.threshold]),
    )
    kept = b.squeeze(b.op("Gather", selected, column, axis=1), 1)
    kept_scores = b.op("Gather", scores, kept, axis=0)
    _, order = b.op("TopK", kept_scores, b.op("Shape", kept), outputs=2, axis=0)
    return b.op("Gather", kept, order, axis=0)

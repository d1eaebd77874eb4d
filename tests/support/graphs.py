"""Small SSD detectors written by hand as ONNX, with the postprocessing of the published file.

The published resnet34-ssd1200.onnx (opset 10) has one NonMaxSuppression over all classes, which
caps each class after suppression, and three outputs; this is that graph on another network.
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from graph_surgery.nms_function import OP_TYPE

IMAGE = 32
LEVELS = ((2, 8), (3, 4), (2, 2))
"""(anchors, grid) of each level."""
PRIORS = sum(a * g * g for a, g in LEVELS)
CLASSES = 5


class Builder:
    """Nodes and initialisers with counted names."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def const(self, value, dtype=np.int64) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def floats(self, value) -> str:
        return self.const(value, np.float32)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes) -> str | list[str]:
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(op_type, inputs, names, f"n{len(self.nodes)}", **attributes)
        )
        return names[0] if outputs == 1 else names

    def unsqueeze(self, x: str, axis: int) -> str:
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=[axis])
        return self.op("Unsqueeze", x, self.const([axis]))

    def squeeze(self, x: str, axis: int) -> str:
        if self.opset < 13:
            return self.op("Squeeze", x, axes=[axis])
        return self.op("Squeeze", x, self.const([axis]))

    def columns(self, x: str, start: int, stop: int, axis: int) -> str:
        return self.op("Slice", x, *(self.const([i]) for i in (start, stop, axis)))

    def reverse(self, x: str, axis: int) -> str:
        return self.op("Slice", x, *(self.const([i]) for i in (-1, -(2**31), axis, -1)))


def grid_priors() -> np.ndarray:
    """Centres and sizes [P, 4] in the order anchor, row, column within a level."""
    rows = []
    for index, (anchors, grid) in enumerate(LEVELS):
        for anchor in range(anchors):
            width, height = 0.2 * (index + 1) + 0.05 * anchor, 0.25 * (index + 1)
            rows += [
                ((x + 0.5) / grid, (y + 0.5) / grid, width, height)
                for y in range(grid)
                for x in range(grid)
            ]
    return np.float32(rows)


@dataclass(frozen=True)
class Variant:
    """One way to write the detector, or one way to get it wrong."""

    opset: int = 10
    batch: int | str = 1
    yxyx: bool = False
    half: bool = False  # network in float16, postprocessing in float32
    norms: bool = False  # a batch norm behind every convolution of the backbone
    cap: int = 60  # max_output_boxes_per_class
    keep: int = 25
    threshold: float = 0.05
    overlap: float = 0.45
    inputs_list_initializers: bool = False  # as IR version 3 demands
    activation: str = "Softmax"
    encoding: str = "CENTER_SIZE"
    layout: str = "anchor-last"  # of the channels: coordinate or class first, then anchor
    lacks: str = ""
    label_offset: int = 1
    nms_nodes: int = 1
    twist: str = ""  # something that NMS_OPT_TRT does not do; see _twist


UNCAPPED = Variant(cap=PRIORS)
"""max_output_boxes_per_class is no cap: suppression then means the same before and after."""


def detector(variant: Variant, seed: int = 0) -> onnx.ModelProto:
    """Image [batch, 3, 32, 32] to boxes [1, n, 4], labels [1, n], scores [1, n]."""
    b = Builder(variant.opset)
    rng = np.random.default_rng(seed)
    kind = np.float16 if variant.half else np.float32

    def conv(x: str, cin: int, cout: int, stride: int, spread: float) -> str:
        weights = rng.normal(0, spread / np.sqrt(cin * 9), (cout, cin, 3, 3))
        bias = np.zeros(cout)
        return b.op(
            "Conv",
            x,
            b.const(weights, kind),
            b.const(bias, kind),
            kernel_shape=[3, 3],
            strides=[stride, stride],
            pads=[1, 1, 1, 1],
        )

    x = b.op("Cast", "image", to=TensorProto.FLOAT16) if variant.half else "image"
    features, cin = [], 3
    for stride in (4, 2, 2):
        x = conv(x, cin, 12, stride, 2.0)
        if variant.norms:
            x = b.op("BatchNormalization", x, *_norm(b, rng, kind), epsilon=0.02)
        x = b.op("Relu", x)
        if stride == 4 and not variant.half and not variant.norms:
            x = b.op("BatchNormalization", x, *_norm(b, rng, kind))
        features.append(x)
        cin = 12
    loc = [conv(f, 12, 4 * a, 1, 1.0) for f, (a, _) in zip(features, LEVELS, strict=True)]
    conf = [conv(f, 12, CLASSES * a, 1, 3.0) for f, (a, _) in zip(features, LEVELS, strict=True)]
    if variant.lacks == "a loc head":
        loc.pop()
    if variant.lacks == "a plain head":
        loc[0] = b.op("Relu", loc[0])
    joined = [_join(b, heads, rows, variant) for heads, rows in ((loc, 4), (conf, CLASSES))]
    _postprocess(b, *joined, variant)
    graph = helper.make_graph(
        b.nodes,
        "detector",
        [
            helper.make_tensor_value_info(
                "image", TensorProto.FLOAT, [variant.batch, 3, IMAGE, IMAGE]
            )
        ],
        [
            helper.make_tensor_value_info("bboxes", TensorProto.FLOAT, [1, "nbox", 4]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [1, "nbox"]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, "nbox"]),
        ],
        b.initializers,
    )
    if variant.inputs_list_initializers:
        graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in b.initializers
        )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", variant.opset)],
        ir_version=3 if variant.inputs_list_initializers else 5 if variant.opset < 13 else 8,
    )
    helper.set_model_props(model, {"made_by": "hand"})
    onnx.checker.check_model(model, full_check=True)
    return model


def _norm(b: Builder, rng: np.random.Generator, kind: type) -> list[str]:
    return [b.const(rng.uniform(0.5, 2, 12), kind) for _ in range(4)]


def _join(b: Builder, heads: list[str], rows: int, variant: Variant) -> str:
    """Flatten by shape arithmetic, as tracing exporters write it, and join to [N, rows, P]."""
    flat = []
    for head in heads:
        batch = b.op("Gather", b.op("Shape", head), b.const(0), axis=0)
        parts = [b.unsqueeze(batch, 0), b.const([rows]), b.const([-1])]
        if variant.layout == "anchor-last":
            flat.append(b.op("Reshape", head, b.op("Concat", *parts, axis=0)))
            continue
        last = b.op("Transpose", head, perm=[0, 2, 3, 1])  # channel = anchor, then coordinate
        shape = b.op("Concat", parts[0], parts[2], parts[1], axis=0)
        flat.append(b.op("Transpose", b.op("Reshape", last, shape), perm=[0, 2, 1]))
    joined = b.op("Concat", *flat, axis=2)
    return b.op("Cast", joined, to=TensorProto.FLOAT) if variant.half else joined


def _postprocess(b: Builder, loc: str, conf: str, variant: Variant) -> None:
    priors = grid_priors()
    deltas = b.op("Transpose", loc, perm=[0, 2, 1])
    xy = b.op("Mul", b.columns(deltas, 0, 2, 2), b.floats(0.1))
    xy = b.op("Add", b.op("Mul", xy, b.floats(priors[None, :, 2:])), b.floats(priors[None, :, :2]))
    wh = b.op("Mul", b.columns(deltas, 2, 4, 2), b.floats(0.2))
    for operator, bound in CLAMPS.get(variant.twist, ()):
        wh = b.op(operator, wh, b.floats(bound))
    wh = wh if variant.encoding == "linear" else b.op("Exp", wh)
    half = b.op("Mul", b.op("Mul", wh, b.floats(priors[None, :, 2:])), b.floats(0.5))
    lt, rb = b.op("Sub", xy, half), b.op("Add", xy, half)
    if variant.yxyx:
        halves = [b.columns(part, i, i + 1, 2) for part in (lt, rb) for i in (1, 0)]
        boxes = b.op("Concat", *halves, axis=2)
    else:
        boxes = b.op("Concat", lt, rb, axis=2)

    logits = b.op("Transpose", conf, perm=[0, 2, 1])
    if variant.activation == "Softmax":
        scores = b.op("Softmax", logits, axis=2)
    else:
        scores = b.op(variant.activation, logits)
    foreground = b.columns(b.op("Transpose", scores, perm=[0, 2, 1]), 1, CLASSES, 1)
    if variant.lacks == "NonMaxSuppression":
        best = b.op("ArgMax", foreground, axis=2, keepdims=0)
        _outputs(b, boxes, best, b.op("ReduceMax", foreground, axes=[2], keepdims=0))
        return
    boxes, foreground = _twist(b, boxes, foreground, variant)
    cap = b.const([variant.cap])
    thresholds = [b.floats([variant.overlap]), b.floats([variant.threshold])]
    selected = [
        b.op("NonMaxSuppression", boxes, foreground, cap, *thresholds)
        for _ in range(variant.nms_nodes)
    ]
    selected = selected[0] if len(selected) == 1 else b.op("Concat", *selected, axis=0)

    label = b.op("Gather", selected, b.const(1), axis=1)
    box = b.op("Gather", selected, b.const(2), axis=1)
    place = b.op("Add", b.op("Mul", label, b.const(PRIORS)), box)
    flat = b.op("Gather", b.op("Reshape", foreground, b.const([-1])), place, axis=0)
    if variant.lacks == "TopK":
        kept = flat
    else:
        count = b.op("Cast", b.op("Shape", flat), to=TensorProto.FLOAT)
        least = b.op("Concat", b.floats([variant.keep]), count, axis=0)
        axes = {} if b.opset >= 18 else {"axes": [0]}
        k = b.op("Cast", b.op("ReduceMin", least, keepdims=1, **axes), to=TensorProto.INT64)
        kept, order = b.op("TopK", flat, k, outputs=2, axis=0)
        if variant.twist == "ascending":
            kept, order = b.reverse(kept, 0), b.reverse(order, 0)
        label, box = (b.op("Gather", part, order, axis=0) for part in (label, box))
    boxes = b.op("Gather", b.squeeze(boxes, 0), box, axis=0)
    labels = b.op("Add", label, b.const(variant.label_offset))
    _outputs(b, *(b.unsqueeze(part, 0) for part in (boxes, labels, kept)))


CLAMPS = {"large clamped": [("Min", 4.135)], "small clamped": [("Max", -4.135)]}
"""Twists of the logarithm of a stretch; torchvision's detectors have the first."""


def _twist(b: Builder, boxes: str, foreground: str, variant: Variant) -> tuple[str, str]:
    """Change boxes [1, P, 4] or scores [1, C - 1, P] before suppression."""
    if variant.twist == "clipped before":
        return b.op("Clip", boxes, b.floats(0), b.floats(1)), foreground
    if variant.twist == "later prior wins":
        return b.reverse(boxes, 1), b.reverse(foreground, 2)
    left, right = (b.op("Transpose", b.columns(boxes, i, i + 1, 2), perm=[0, 2, 1]) for i in (0, 2))
    if variant.twist == "second threshold, far":
        counts = b.op("Greater", foreground, b.floats(variant.threshold + 0.05))
    elif variant.twist == "second threshold, near":
        counts = b.op("Greater", foreground, b.floats(variant.threshold * 1.02))
    elif variant.twist == "small dropped":
        counts = b.op("Greater", b.op("Sub", right, left), b.floats(0.002))
    elif variant.twist == "large dropped":
        counts = b.op("Less", b.op("Sub", right, left), b.floats(10))
    elif variant.twist == "outside dropped":
        counts = b.op("Less", left, b.floats(1))
    elif variant.twist == "best class alone":
        best = b.op("ReduceMax", foreground, axes=[1], keepdims=1)
        counts = b.op("Equal", foreground, best)
    else:
        return boxes, foreground
    return boxes, b.op("Where", counts, foreground, b.floats(0))


def _outputs(b: Builder, boxes: str, labels: str, scores: str) -> None:
    for source, name in ((boxes, "bboxes"), (labels, "labels"), (scores, "scores")):
        b.nodes.append(helper.make_node("Identity", [source], [name]))


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def nms_node(model: onnx.ModelProto) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if node.op_type == OP_TYPE)
    return node


def rows_of_three(bboxes, labels, scores, order=(1, 0, 3, 2)) -> np.ndarray:
    """Outputs of graphs.detector as rows without the image index."""
    boxes = bboxes[0].clip(0, 1)[:, order]
    return np.concatenate([boxes, scores[0][:, None], labels[0][:, None]], axis=1)


def assert_same_detections(actual, expected, atol=1e-5):
    """Rows [n, 6] are the same, up to the order of scores that are equal up to rounding."""
    assert len(actual) == len(expected)
    np.testing.assert_allclose(actual[:, 4], expected[:, 4], atol=atol)
    distance = np.abs(actual[:, None] - expected[None]).max(axis=2)
    assert (distance.min(axis=1) <= atol).all()
    assert (distance.min(axis=0) <= atol).all()


def attributes_of(model: onnx.ModelProto) -> dict:
    return {a.name: helper.get_attribute_value(a) for a in nms_node(model).attribute}


def priors_of(model: onnx.ModelProto) -> np.ndarray:
    (priors,) = (t for t in model.graph.initializer if t.name == nms_node(model).input[-1])
    return numpy_helper.to_array(priors)


VARIANTS = {
    "opset 10": UNCAPPED,
    "opset 11": replace(UNCAPPED, opset=11),
    "opset 13": replace(UNCAPPED, opset=13),
    "opset 17": replace(UNCAPPED, opset=17),
    "opset 18": replace(UNCAPPED, opset=18),
    "opset 22": replace(UNCAPPED, opset=22),
    "IR 3": replace(UNCAPPED, inputs_list_initializers=True),
    "yxyx": replace(UNCAPPED, yxyx=True, opset=13),
    "float16 network": replace(UNCAPPED, half=True, opset=13),
    "other numbers": replace(UNCAPPED, keep=7, threshold=0.4, overlap=0.2),
}

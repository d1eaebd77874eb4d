"""Small SSD detectors in the forms of `habits`: two levels, five classes, 32 x 32, batch 1."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.data.preprocessed import MEAN, STD
from tests.support.graphs import IMAGE, Builder
from tests.support.habits import Habits

LEVELS = ((2, 8), (3, 4))
"""(anchors, grid) of each level."""
CLASSES = 5
KEEP = 25


class Writer(Builder):
    """A `Builder` that knows what changed between opsets."""

    def reduce(self, op_type: str, x: str, axis: int, since: int = 18) -> str:
        if self.opset < since:
            return self.op(op_type, x, axes=[axis], keepdims=1)
        return self.op(op_type, x, self.const([axis]), keepdims=1)

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        if self.opset < 13:
            return self.op("Split", x, outputs=len(sizes), axis=axis, split=sizes)
        return self.op("Split", x, self.const(sizes), outputs=len(sizes), axis=axis)


def write(habits: Habits, seed: int = 0) -> onnx.ModelProto:
    """Image float32 [1, 3, 32, 32] or NHWC to boxes, labels, scores, [1, n, ...] or [n, ...]."""
    b = Writer(habits.opset)
    loc, conf, feature = _network(b, habits, np.random.default_rng(seed))
    boxes = _boxes(b, _join(b, loc, 4, habits), habits)
    scores = _scores(b, _join(b, conf, CLASSES, habits), habits)
    made = {"best class": _best_class, "batched": _batched}.get(habits.nms, _by_class)(
        b, boxes, scores, habits
    )
    kinds = [TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT]
    if habits.label == "int32":
        kinds[1] = TensorProto.INT32
    first = [1] if habits.output == "batch" else []
    shapes = [[*first, "n", 4], [*first, "n"], [*first, "n"]]
    outputs = list(map(helper.make_tensor_value_info, ("boxes", "labels", "scores"), kinds, shapes))
    for source, output in zip(made, outputs, strict=True):
        value = b.unsqueeze(source, 0) if first else source
        b.nodes.append(helper.make_node("Identity", [value], [output.name]))
    outputs += _beside(b, feature, habits)
    shape = [1, 3, IMAGE, IMAGE] if habits.image == "NCHW" else [1, IMAGE, IMAGE, 3]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)]
    if habits.beside == "input":
        inputs.append(helper.make_tensor_value_info("unread", TensorProto.INT64, [1, 2]))
    graph = helper.make_graph(b.nodes, "detector", inputs, outputs, b.initializers)
    opsets = [helper.make_opsetid("", habits.opset)]
    version = helper.find_min_ir_version_for(opsets)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version)
    onnx.checker.check_model(model, full_check=True)
    return model


def feeds(model: onnx.ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    """The image [1, 3, H, W] as the model takes it, and zeros for an input that nothing reads."""
    if model.graph.input[0].type.tensor_type.shape.dim[3].dim_value == 3:
        image = image.transpose(0, 2, 3, 1)
    more = {v.name: np.zeros((1, 2), np.int64) for v in model.graph.input if v.name != "image"}
    return {"image": image} | more


def rows(outputs: list[np.ndarray], habits: Habits) -> np.ndarray:
    """Boxes, labels and scores as rows of NMS_OPT_TRT without the image index."""
    boxes, labels, scores = (
        value[0] if habits.output == "batch" else value for value in outputs[:3]
    )
    boxes = boxes if habits.corners == "yxyx" else boxes[:, [1, 0, 3, 2]]
    return np.concatenate([boxes.clip(0, 1), scores[:, None], labels[:, None]], axis=1)


def _network(
    b: Writer, habits: Habits, rng: np.random.Generator
) -> tuple[list[str], list[str], str]:
    kind = np.float16 if habits.half else np.float32

    def stored(value: np.ndarray) -> str:
        if habits.weights == "Constant":
            return b.op("Constant", value=numpy_helper.from_array(value.astype(kind)))
        name = b.const(value, kind)
        return b.op("Identity", name) if habits.weights == "Identity" else name

    def weight(cout: int, cin: int, spread: float) -> str:
        return stored(rng.normal(0, spread / np.sqrt(cin * 9), (cout, cin, 3, 3)))

    def conv(x: str, w: str, bias: str, stride: int = 1, group: int = 1) -> str:
        window = {"kernel_shape": [3, 3], "strides": [stride] * 2, "group": group}
        return b.op("Conv", x, w, bias, pads=[1, 1, 1, 1], **window)

    def active(x: str) -> str:
        more = {"Clip": [b.const(0, kind), b.const(6, kind)]} if habits.active == "Clip" else {}
        if habits.active == "PRelu":
            more = {"PRelu": [b.const(np.full((12, 1, 1), 0.25), kind)]}
        return b.op(habits.active, x, *more.get(habits.active, []))

    def block(x: str, cin: int, stride: int) -> str:
        y = conv(x, weight(12, cin, 2.0), stored(rng.normal(0, 0.1, 12)), stride)
        if habits.norm == "behind Identity":
            y = b.op("Identity", y)
        if habits.norm != "none":
            y = b.op(
                "BatchNormalization", y, *(b.const(rng.uniform(0.5, 2, 12), kind) for _ in "gbmv")
            )
        return active(y)

    x = "image"
    if habits.image == "NHWC":
        x = b.op("Transpose", x, perm=[0, 3, 1, 2])
    if habits.stem == "scaled":
        x = b.op("Div", b.op("Sub", x, b.floats(0.1)), b.floats(0.8))
    if habits.stem == "normalised":
        shape = [3] if habits.image == "NHWC, turned later" else [1, 3, 1, 1]
        mean, deviation = (b.floats(np.reshape(one, shape)) for one in (MEAN, STD))
        x = b.op("Div", b.op("Sub", x, mean), deviation)
    if habits.image == "NHWC, turned later":
        x = b.op("Transpose", b.op("Neg", x), perm=[0, 3, 1, 2])
    if habits.half:
        x = b.op("Cast", x, to=TensorProto.FLOAT16)
    x = block(x, 3, 4)
    if habits.block == "residual":
        x = active(b.op("Add", conv(block(x, 12, 1), weight(12, 12, 1.0), stored(np.zeros(12))), x))
    elif habits.block == "depthwise":
        x = conv(x, weight(12, 1, 2.0), stored(np.zeros(12)), group=12)
    elif habits.block == "MaxPool":
        x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    features = [x, block(x, 12, 2)][: habits.levels]
    heads: list[list[str]] = []
    for rows, spread in ((4, 1.0), (CLASSES, 0.7)):
        heads.append([])
        for feature, (anchors, _) in zip(features, LEVELS, strict=False):
            if not heads[-1] or habits.weights != "shared":
                w = weight(rows * anchors, 12, spread), stored(rng.normal(0, 0.1, rows * anchors))
            heads[-1].append(conv(feature, *w))
    return heads[0], heads[1], x


def _anchors(level: int, habits: Habits) -> int:
    return LEVELS[0][0] if habits.weights == "shared" else LEVELS[level][0]


def _sizes(habits: Habits) -> list[tuple[int, int]]:
    return [(_anchors(i, habits), LEVELS[i][1]) for i in range(habits.levels)]


def _priors(habits: Habits) -> tuple[np.ndarray, np.ndarray]:
    """Centres and sizes, [P, 2] each."""
    levels = []
    for level, (anchors, grid) in enumerate(_sizes(habits)):
        rows = []
        y, x = np.divmod(np.arange(grid * grid), grid)
        for anchor in range(anchors):
            size = 0.2 * (level + 1) + 0.05 * anchor, 0.25 * (level + 1)
            rows.append(
                np.stack(
                    [(x + 0.5) / grid, (y + 0.5) / grid, *np.broadcast_arrays(*size, x)[:2]], 1
                )
            )
        level_rows = np.stack(rows, axis=habits.priors == "by cell")
        levels.append(level_rows.reshape(-1, 4))
    centre, size = np.split(np.concatenate(levels).astype(np.float32), 2, axis=1)
    return centre, size


def _join(b: Writer, heads: list[str], rows: int, habits: Habits) -> str:
    """[N, rows, P], or [N, P, rows] where each level is turned, then turned back."""
    flat = []
    by_anchor, by_cell = habits.channels == "anchor first", habits.priors == "by cell"
    for head, (anchors, grid) in zip(heads, _sizes(habits), strict=True):
        x, cells = head, anchors * grid * grid
        shape = b.const([1, rows, cells] if habits.flat == "constant" else [0, rows, -1])
        if habits.flat == "arithmetic":
            batch = b.op("Gather", b.op("Shape", x), b.const(0), axis=0)
            parts = [b.unsqueeze(batch, 0), b.const([rows]), b.const([-1])]
            shape = b.op("Concat", *parts, axis=0)
        elif habits.flat == "NHWC":
            x = b.op("Transpose", b.op("Transpose", x, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])
        elif habits.flat == "Flatten":
            x = b.op("Flatten", x, axis=1)
        if by_anchor and by_cell:  # as torchvision and TensorFlow have it
            x = b.op("Transpose", head, perm=[0, 2, 3, 1])
            x = b.op("Transpose", b.op("Reshape", x, b.const([0, -1, rows])), perm=[0, 2, 1])
        elif by_anchor or by_cell:
            both = [anchors, rows] if by_anchor else [rows, anchors]
            x = b.op("Reshape", head, b.const([0, *both, grid, grid]))
            x = b.op("Transpose", x, perm=[0, 1, 3, 4, 2] if by_cell else [0, 2, 1, 3, 4])
            x = b.op("Reshape", x, shape)
        else:
            x = b.op("Reshape", x, shape)
        flat.append(b.op("Transpose", x, perm=[0, 2, 1]) if habits.flat == "rows" else x)
    axis = 1 if habits.flat == "rows" else 2
    if habits.flat == "nested":
        flat[0] = b.op("Concat", flat[0], axis=axis)
    joined = b.op("Concat", *flat, axis=axis) if len(flat) > 1 else flat[0]
    joined = b.op("Transpose", joined, perm=[0, 2, 1]) if habits.flat == "rows" else joined
    return b.op("Cast", joined, to=TensorProto.FLOAT) if habits.half else joined


def _boxes(b: Writer, loc: str, habits: Habits) -> str:
    """Boxes [1, P, 4] of deltas [1, 4, P]."""
    centre, size = _priors(habits)
    deltas = b.op("Transpose", loc, perm=[0, 2, 1])
    if habits.deltas == "dy, dx":
        deltas = b.op("Gather", deltas, b.const([1, 0, 3, 2]), axis=2)
    variances = {"xy": 0.1, "wh": 0.2}
    if habits.decode in ("one scale", "Div"):
        scale = np.float32([0.1, 0.1, 0.2, 0.2])
        divide = habits.decode == "Div"
        deltas = b.op("Div" if divide else "Mul", deltas, b.floats(1 / scale if divide else scale))
        variances = {}
    if habits.decode == "Slice":
        xy, wh = b.columns(deltas, 0, 2, 2), b.columns(deltas, 2, 4, -1)
    elif habits.decode == "Gather":
        xy, wh = (b.op("Gather", deltas, b.const(i), axis=2) for i in ([0, 1], [2, 3]))
    else:
        xy, wh = b.split(deltas, [2, 2], 2)
    if habits.decode == "premultiplied":
        xy = b.op("Mul", xy, b.floats(size * np.float32(0.1)))
    else:
        xy = b.op("Mul", xy, b.floats(variances["xy"])) if variances else xy
        xy = b.op("Mul", b.floats(size[None]), xy)
    xy = b.op("Add", xy, b.floats(centre[None]))
    wh = b.op("Mul", wh, b.floats(variances["wh"])) if variances else wh
    if habits.decode == "clamped":
        wh = b.op("Min", wh, b.floats(np.log(1000 / 16)))
    wh = b.op("Pow", b.floats(np.e), wh) if habits.decode == "Pow" else b.op("Exp", wh)
    wh = b.op("Mul", wh, b.floats(size))
    if habits.corners == "centre":
        return b.op("Concat", xy, wh, axis=2)
    return _corners(b, xy, wh, habits)


def _corners(b: Writer, xy: str, wh: str, habits: Habits) -> str:
    half = b.op("Div", wh, b.floats(2))
    parts = [b.op("Sub", xy, half), b.op("Add", xy, half)]
    if habits.corners == "yxyx":
        parts = [b.columns(part, i, i + 1, -1) for part in parts for i in (1, 0)]
    return b.op("Concat", *parts, axis=-1)


def _scores(b: Writer, conf: str, habits: Habits) -> str:
    """Scores [1, C', P] of logits [1, C, P]; C' leaves out the background or not."""
    if habits.softmax == "axis 1" and b.opset >= 13:
        scores = b.op("Softmax", conf, axis=1)
    elif habits.softmax == "written out":
        raised = b.op("Exp", b.op("Sub", conf, b.reduce("ReduceMax", conf, 1)))
        scores = b.op("Div", raised, b.reduce("ReduceSum", raised, 1, since=13))
    else:
        logits = b.op("Transpose", conf, perm=[0, 2, 1])
        if habits.softmax == "2-D":
            flat = b.op("Softmax", b.op("Reshape", logits, b.const([-1, CLASSES])), axis=1)
            scores = b.op("Reshape", flat, b.const([1, -1, CLASSES]))
        elif habits.softmax == "LogSoftmax":
            scores = b.op("Exp", b.op("LogSoftmax", logits, axis=2))
        elif habits.softmax == "Sigmoid":
            scores = b.op("Sigmoid", logits)
        else:
            scores = b.op("Softmax", logits, axis=2)
        scores = b.op("Transpose", scores, perm=[0, 2, 1])
    if habits.background == "none":
        return scores
    if habits.background == "Gather":
        return b.op("Gather", scores, b.const(range(1, CLASSES)), axis=1)
    if habits.background == "Split":
        return b.split(scores, [1, CLASSES - 1], 1)[1]
    if habits.background == "masked":
        shown = np.arange(CLASSES) > 0
        return b.op("Mul", scores, b.floats(shown[None, :, None]))
    return b.columns(scores, 1, 2**31 - 1, 1)


def _suppress(b: Writer, boxes: str, scores: str, habits: Habits, cap: int) -> list[str]:
    """Selected indices int64 [n, 3], and their columns class and box."""
    thresholds = b.floats([0.45]), b.floats([0.05])
    form = {"center_point_box": 1} if habits.corners == "centre" else {}
    indices = b.op("NonMaxSuppression", boxes, scores, b.const([cap]), *thresholds, **form)
    if habits.column == "Gather":
        return [indices, *(b.op("Gather", indices, b.const(i), axis=1) for i in (1, 2))]
    if habits.column == "Slice":
        columns = [b.columns(indices, i, i + 1, 1) for i in (1, 2)]
    else:
        columns = b.split(indices, [1, 1, 1], 1)[1:]
    return [indices, *(b.squeeze(column, 1) for column in columns)]


def _total(habits: Habits) -> int:
    return sum(anchors * grid * grid for anchors, grid in _sizes(habits))


def _by_class(b: Writer, boxes: str, scores: str, habits: Habits) -> list[str]:
    total = _total(habits)
    indices, label, box = _suppress(b, boxes, scores, habits, total)
    if habits.score == "GatherND":
        score = b.op("GatherND", scores, indices)
    else:
        place = b.op("Add", b.op("Mul", label, b.const(total)), box)
        score = b.op("Gather", b.op("Reshape", scores, b.const([-1])), place, axis=0)
    return _best(b, boxes, (label, box, score), habits)


def _batched(b: Writer, boxes: str, scores: str, habits: Habits) -> list[str]:
    """One class of C' * P boxes, moved apart by a multiple of their largest coordinate."""
    total, labels = _total(habits), CLASSES - habits.offset
    every = b.op("Tile", boxes, b.const([1, labels, 1]))
    apart = b.op("Add", b.op("ReduceMax", boxes, keepdims=0), b.floats(1))
    number = b.floats(np.repeat(np.arange(labels), total)[None, :, None])
    moved = b.op("Add", every, b.op("Mul", number, apart))
    flat = b.op("Reshape", scores, b.const([1, 1, -1]))
    _, _, place = _suppress(b, moved, flat, habits, total * labels)
    score = b.op("Gather", b.op("Reshape", scores, b.const([-1])), place, axis=0)
    label = b.op("Div", place, b.const(total))
    box = b.op("Mod", place, b.const(total))
    return _best(b, boxes, (label, box, score), habits)


def _best_class(b: Writer, boxes: str, scores: str, habits: Habits) -> list[str]:
    """Every box with its best class alone, and classes that suppress one another."""
    best = b.reduce("ReduceMax", scores, 1)
    _, _, box = _suppress(b, boxes, best, habits, _total(habits))
    label = b.op("Gather", b.squeeze(b.op("ArgMax", scores, axis=1, keepdims=0), 0), box, axis=0)
    score = b.op("Gather", b.op("Reshape", best, b.const([-1])), box, axis=0)
    return _best(b, boxes, (label, box, score), habits)


def _best(b: Writer, boxes: str, found: tuple[str, str, str], habits: Habits) -> list[str]:
    """The `KEEP` best: boxes [n, 4], labels [n], scores [n]."""
    label, box, score = found
    if habits.keep == "Min" and b.opset >= 12:
        k = b.op("Min", b.op("Shape", score), b.const([KEEP]))
    else:
        count = b.op("Cast", b.op("Shape", score), to=TensorProto.FLOAT)
        least = b.reduce("ReduceMin", b.op("Concat", b.floats([KEEP]), count, axis=0), 0)
        k = b.op("Cast", least, to=TensorProto.INT64)
    score, order = b.op("TopK", score, k, outputs=2, axis=0)
    label, box = (b.op("Gather", part, order, axis=0) for part in (label, box))
    offset = habits.offset
    if habits.label in ("table", "gaps"):
        table = np.arange(CLASSES) + offset
        label = b.op("Gather", b.const(table + (habits.label == "gaps") * (table > 2)), label)
    elif offset:
        label = b.op("Add", label, b.const(offset))
    if habits.label == "int32":
        label = b.op("Cast", label, to=TensorProto.INT32)
    chosen = b.op("Gather", b.squeeze(boxes, 0), box, axis=0)
    if habits.corners == "centre":
        chosen = _corners(b, *b.split(chosen, [2, 2], 1), habits)
    return [chosen, label, score]


def _beside(b: Writer, feature: str, habits: Habits) -> list[onnx.ValueInfoProto]:
    """Outputs that are none of the tail's."""
    kind = TensorProto.FLOAT16 if habits.half else TensorProto.FLOAT
    size = LEVELS[0][1]
    if habits.beside == "strings":
        names = numpy_helper.from_array(np.array(["a", "b"], object), "names")
        b.nodes.append(helper.make_node("Constant", [], ["beside"], value=names))
        return [helper.make_tensor_value_info("beside", TensorProto.STRING, [2])]
    if habits.beside == "scalar":
        b.nodes.append(helper.make_node("ReduceMax", [feature], ["beside"], keepdims=0))
        return [helper.make_tensor_value_info("beside", kind, [])]
    if habits.beside == "features":
        b.nodes.append(helper.make_node("Identity", [feature], ["beside"]))
        return [helper.make_tensor_value_info("beside", kind, [1, 12, size, size])]
    if habits.beside == "NonZero":
        b.nodes.append(helper.make_node("NonZero", [feature], ["beside"]))
        return [helper.make_tensor_value_info("beside", TensorProto.INT64, [4, "m"])]
    return []

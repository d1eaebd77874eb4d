"""NMS_OPT_TRT cases: its function in ONNX Runtime, priors, random head tensors, strict checks."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from hypothesis import strategies as st

from graph_surgery.nms_function import MIN_IR_VERSION, NmsAttributes, add_nms, input_names
from tests.support.nms_oracle import decode, iou, sigmoid, softmax

SSD = NmsAttributes(
    numClasses=81,
    topK=200,
    keepTopK=200,
    confidenceThreshold=0.05,
    nmsThreshold=0.5,
    backgroundLabelId=0,
    numLayers=6,
    inputOrder=(0, 6, 12),
)
LEVELS = [(4, 50, 50), (6, 25, 25), (6, 13, 13), (6, 7, 7), (4, 3, 3), (4, 3, 3)]
VARIANCES = np.float32([0.1, 0.1, 0.2, 0.2])


def make_model(attributes, levels, priors, dtype=np.float32, opset=18) -> onnx.ModelProto:
    """One NMS_OPT_TRT node; levels are (anchors, height, width)."""
    names = input_names(len(levels))
    channels = [4] * len(levels) + [attributes.numClasses] * len(levels)
    inputs = [
        gs.Variable(name, np.dtype(dtype), ["N", rows * a, h, w])
        for name, rows, (a, h, w) in zip(names, channels, [*levels, *levels], strict=False)
    ]
    opsets = [onnx.helper.make_opsetid("", opset)]
    graph = gs.Graph(
        inputs=inputs, name="nms", opset=opset, import_domains=opsets, ir_version=MIN_IR_VERSION
    )
    tensors = [*inputs, gs.Constant("priors", np.float32(priors))]
    graph.outputs = add_nms(graph, tensors, attributes, "N")
    model = gs.export_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, levels, loc, conf):
    """Run on joined head tensors [N, 4, P] and [N, C, P]."""
    ends = np.cumsum([a * h * w for a, h, w in levels])[:-1]
    parts = [*np.split(loc, ends, axis=2), *np.split(conf, ends, axis=2)]
    grids = [*levels, *levels]
    feeds = {
        name: np.ascontiguousarray(part).reshape(len(loc), -1, h, w)
        for name, part, (_, h, w) in zip(input_names(len(levels)), parts, grids, strict=False)
    }
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def plane(ltrb) -> np.ndarray:
    """Prior corners [P, 4] to the priors tensor [2, P * 4, 1]."""
    corners = np.float32(ltrb)
    return np.stack([corners, np.broadcast_to(VARIANCES, corners.shape)]).reshape(2, -1, 1)


def check_rows(detections, count, expected, expected_count):
    assert detections.dtype == np.float32
    assert count.dtype == np.int32
    assert detections.shape == expected.shape
    assert count.tolist() == expected_count.tolist()
    assert detections[..., [0, 6]].tolist() == expected[..., [0, 6]].tolist()
    np.testing.assert_allclose(detections, expected, atol=1e-5)
    for rows, used in zip(detections, count, strict=True):
        assert (rows[used:, 1:] == [0, 0, 0, 0, 0, -1]).all()


def with_attributes(levels, **attributes) -> NmsAttributes:
    """Small values where a test names no others."""
    count = len(levels)
    small = {
        "numClasses": 2,
        "topK": 4,
        "keepTopK": 4,
        "confidenceThreshold": 0.05,
        "nmsThreshold": 0.5,
        "backgroundLabelId": 0,
    }
    return NmsAttributes(numLayers=count, inputOrder=(0, count, 2 * count), **(small | attributes))


def apart(count: int) -> np.ndarray:
    """Priors that do not overlap."""
    x = np.arange(count)[:, None] / count
    return plane(np.concatenate([x, 0 * x, x + 0.5 / count, 0 * x + 0.5], axis=1))


def random_heads(levels, classes, batch, *, seed=0, spread=2.0, background=None):
    """Priors that overlap, deltas and logits [N, 4, P] and [N, C, P], float32.

    `background`: what is added to the logits of class 0.
    """
    rng = np.random.default_rng(seed)
    count = sum(a * h * w for a, h, w in levels)
    centre, size = rng.random((count, 2)), rng.uniform(0.1, 0.5, (count, 2))
    priors = plane(np.concatenate([centre - size / 2, centre + size / 2], axis=1))
    loc = rng.normal(size=(batch, 4, count)).astype(np.float32)
    conf = (spread * rng.normal(size=(batch, classes, count))).astype(np.float32)
    conf[:, 0] += background or 0
    return levels, priors, loc, conf


SIGMOID = {"confSigmoid": 1, "confSoftmax": 0}

SPECIAL_LOGITS = [np.nan, np.inf, -np.inf, 6e4, -6e4]
SPECIAL_DELTAS = [np.nan, np.inf, -np.inf, 6e4, -6e4]


@st.composite
def cases(draw, *, version=1):
    """A configuration and head tensors made of few distinct columns, so that ties abound."""
    levels = draw(
        st.lists(
            st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
            min_size=1,
            max_size=3,
        )
    )
    classes, ours = draw(st.integers(1, 6)), {}
    if version == 2:
        ours = {
            "levelTopK": draw(st.integers(0, 8)),
            "clipBeforeNms": draw(st.integers(0, 1)),
            "bboxXformClip": draw(st.sampled_from([0.0, 0.05, 0.3])),
        }
    cap = len(levels) * ours.get("levelTopK", 0)
    attributes = with_attributes(
        levels,
        numClasses=classes,
        topK=cap or draw(st.integers(1, 12)),
        keepTopK=draw(st.integers(1, 20)),
        confidenceThreshold=draw(st.sampled_from([0.0, 0.0523, 0.2137, 0.5171])),
        nmsThreshold=draw(st.sampled_from([0.1371, 0.3719, 0.5333, 1.0])),
        backgroundLabelId=draw(st.integers(-1, classes - 1)),
        **draw(st.sampled_from([{}, SIGMOID])),
        **ours,
    )
    batch, count = draw(st.integers(1, 5)), sum(a * h * w for a, h, w in levels)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.integers(-12, 13, (draw(st.integers(1, 5)), classes)) / 4
    deltas = rng.normal(size=(draw(st.integers(1, 5)), 4))
    corners = rng.integers(-2, 11, (count, 4)) / 8
    if draw(st.booleans()):  # without this many priors are inverted or empty
        corners = np.sort(corners.reshape(count, 2, 2), axis=1).reshape(count, 4)
        corners[:, 2:] += 0.125
    which_logits = rng.integers(len(logits), size=(batch, count))
    conf = logits[which_logits].transpose(0, 2, 1)
    loc = deltas[rng.integers(len(deltas), size=(batch, count))].transpose(0, 2, 1)
    for tensor, special in ((conf, SPECIAL_LOGITS), (loc, SPECIAL_DELTAS)):
        if draw(st.booleans()):
            broken = rng.random(tensor.shape) < 0.05
            tensor[broken] = rng.choice(special, broken.sum())
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    return attributes, levels, plane(corners), loc.astype(dtype), conf.astype(dtype)


def is_decided(attributes, priors, loc, conf) -> bool:
    """Whether no comparison of the operator hangs on the rounding of a softmax or an IoU."""
    used = np.isfinite(conf).all(axis=1, keepdims=True)
    activation = sigmoid if attributes.confSigmoid else softmax
    scores = activation(conf)[np.broadcast_to(used, conf.shape)]
    if (np.abs(scores[scores > 0] - attributes.confidenceThreshold) < 1e-5).any():
        return False
    if (np.diff(np.unique(np.round(scores, 7))) < 2e-6).any():
        return False
    if attributes.nmsThreshold == 1:
        return True
    boxes = decode(loc, priors, attributes.bboxXformClip)
    if attributes.clipBeforeNms:
        boxes = boxes.clip(0, 1)
    return not any(
        abs(iou(a, b) - attributes.nmsThreshold) < 1e-4
        for image in boxes
        for i, a in enumerate(image)
        for b in image[:i]
    )


def columns_are_distinct(conf) -> bool:
    """Whether no two columns of logits have the same scores but for the rounding of their sums.

    Columns that are permutations have, and those that are but for logits too low to count. Scores
    of 1 and 0 are exact, and may be equal.
    """
    columns = np.unique(np.moveaxis(np.float32(conf), 1, -1).reshape(-1, conf.shape[1]), axis=0)
    columns = np.float64(columns[np.isfinite(columns).all(axis=1)])
    powers = np.exp(columns - columns.max(axis=1, keepdims=True, initial=-np.inf))
    scores = np.sort(powers / powers.sum(axis=1, keepdims=True), axis=1)
    scores = scores[np.float32(scores[:, :-1]).any(axis=1)]
    alike = (np.abs(scores[:, None] - scores) < 1e-6).all(axis=-1)
    return int(alike.sum()) == len(scores)

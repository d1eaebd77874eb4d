"""NMS_OPT_TRT's definition in ONNX Runtime, against golden detections and brute force."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nms_oracle import decode, iou, nms_opt, softmax
from onnx import TensorProto, helper, numpy_helper

from graph_surgery.errors import SurgeryError
from graph_surgery.nms_function import (
    DOMAIN,
    DOMAIN_VERSION,
    MIN_IR_VERSION,
    NmsAttributes,
    input_names,
    nms_function,
    nms_node,
)

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
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = input_names(len(levels))
    channels = [4] * len(levels) + [attributes.numClasses] * len(levels)
    inputs = [
        helper.make_tensor_value_info(name, kind, ["N", rows * a, h, w])
        for name, rows, (a, h, w) in zip(names, channels, [*levels, *levels], strict=False)
    ]
    outputs = [
        helper.make_tensor_value_info(
            "detections", TensorProto.FLOAT, ["N", attributes.keepTopK, 7]
        ),
        helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["N"]),
    ]
    graph = helper.make_graph(
        [nms_node(names, attributes)],
        "nms",
        inputs,
        outputs,
        [numpy_helper.from_array(np.float32(priors), "priors")],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=MIN_IR_VERSION,
        functions=[nms_function(len(levels), opset)],
    )
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


@pytest.mark.parametrize("opset", [18, 20, onnx.defs.onnx_opset_version()])
def test_golden_detections(golden, opset):
    priors = plane(np.load(golden / "default_boxes.npz")["ltrb"])
    model = make_model(SSD, LEVELS, priors, opset=opset)
    cases = [np.load(golden / f"nms_{i}.npz") for i in (1, 2, 3)]
    loc = np.stack([case["loc"] for case in cases]).astype(np.float32)
    conf = np.stack([case["conf"] for case in cases]).astype(np.float32)
    detections, count = run(model, LEVELS, loc, conf)
    assert count.tolist() == [len(case["labels"]) for case in cases]
    for rows, used, case in zip(detections, count, cases, strict=True):
        assert rows[:used, 6].tolist() == case["labels"].tolist()
        np.testing.assert_allclose(rows[:used, 5], case["scores"], atol=1e-5)
        boxes = case["boxes_ltrb"].clip(0, 1)[:, [1, 0, 3, 2]]
        np.testing.assert_allclose(rows[:used, 1:5], boxes, atol=1e-5)


def test_float16_heads_are_read_as_they_are(golden):
    """The golden heads are float16: fed as such they give the same rows."""
    priors = plane(np.load(golden / "default_boxes.npz")["ltrb"])
    case = np.load(golden / "nms_1.npz")
    loc, conf = case["loc"][None], case["conf"][None]
    half = run(make_model(SSD, LEVELS, priors, np.float16), LEVELS, loc, conf)
    full = run(
        make_model(SSD, LEVELS, priors), LEVELS, loc.astype(np.float32), conf.astype(np.float32)
    )
    for a, b in zip(half, full, strict=True):
        np.testing.assert_array_equal(a, b)


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


def check_against_oracle(attributes, levels, priors, loc, conf):
    actual = run(make_model(attributes, levels, priors, conf.dtype), levels, loc, conf)
    expected = nms_opt(
        loc.astype(np.float32),
        conf.astype(np.float32),
        priors,
        top_k=attributes.topK,
        keep_top_k=attributes.keepTopK,
        confidence_threshold=attributes.confidenceThreshold,
        nms_threshold=attributes.nmsThreshold,
        background=attributes.backgroundLabelId,
    )
    check_rows(*actual, *expected)
    return actual


SPECIAL_LOGITS = [np.nan, np.inf, -np.inf, 6e4, -6e4]
SPECIAL_DELTAS = [np.nan, np.inf, -np.inf, 6e4, -6e4]


@st.composite
def cases(draw):
    """A configuration and head tensors made of few distinct columns, so that ties abound."""
    levels = draw(
        st.lists(
            st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
            min_size=1,
            max_size=3,
        )
    )
    classes = draw(st.integers(1, 6))
    attributes = with_attributes(
        levels,
        numClasses=classes,
        topK=draw(st.integers(1, 12)),
        keepTopK=draw(st.integers(1, 20)),
        confidenceThreshold=draw(st.sampled_from([0.0, 0.0523, 0.2137, 0.5171])),
        nmsThreshold=draw(st.sampled_from([0.1371, 0.3719, 0.5333, 1.0])),
        backgroundLabelId=draw(st.integers(-1, classes - 1)),
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
    scores = softmax(conf)[np.broadcast_to(used, conf.shape)]
    if (np.abs(scores[scores > 0] - attributes.confidenceThreshold) < 1e-6).any():
        return False
    if (np.diff(np.unique(np.round(scores, 7))) < 2e-6).any():
        return False
    if attributes.nmsThreshold == 1:
        return True
    boxes = decode(loc, priors)
    return not any(
        abs(iou(a, b) - attributes.nmsThreshold) < 1e-5
        for image in boxes
        for i, a in enumerate(image)
        for b in image[:i]
    )


def columns_are_distinct(conf) -> bool:
    """Whether no two columns of logits are permutations, whose softmax sums round differently."""
    columns = np.unique(np.moveaxis(np.float32(conf), 1, -1).reshape(-1, conf.shape[1]), axis=0)
    columns = columns[np.isfinite(columns).all(axis=1)]
    shifted = np.sort(columns - columns.max(axis=1, keepdims=True, initial=-np.inf), axis=1)
    return len(np.unique(shifted, axis=0)) == len(columns)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_brute_force(case):
    attributes, levels, priors, loc, conf = case
    assume(columns_are_distinct(conf))
    assume(is_decided(attributes, priors, np.float32(loc), np.float32(conf)))
    check_against_oracle(attributes, levels, priors, loc, conf)


ROW = [(1, 1, 4)]
"""One level of four priors in a row."""

NO_DELTAS = np.zeros((1, 4, 4), np.float32)


def apart(count: int) -> np.ndarray:
    """Priors that do not overlap."""
    x = np.arange(count)[:, None] / count
    return plane(np.concatenate([x, 0 * x, x + 0.5 / count, 0 * x + 0.5], axis=1))


def test_no_candidate_in_any_image():
    attributes = with_attributes(ROW, numClasses=3)
    conf = np.zeros((3, 3, 4), np.float32)
    conf[:, 0] = 20
    _, count = check_against_oracle(attributes, ROW, apart(4), NO_DELTAS[[0, 0, 0]], conf)
    assert count.tolist() == [0, 0, 0]


def test_every_candidate():
    attributes = with_attributes(ROW, numClasses=3, keepTopK=20, backgroundLabelId=-1)
    conf = np.zeros((2, 3, 4), np.float32)
    detections, count = check_against_oracle(attributes, ROW, apart(4), NO_DELTAS[[0, 0]], conf)
    assert count.tolist() == [12, 12]
    assert detections[0, :12, 6].tolist() == [0] * 4 + [1] * 4 + [2] * 4  # ties: class, then prior


def test_score_at_the_threshold_is_no_candidate():
    conf = np.zeros((1, 2, 4), np.float32)  # softmax is 0.5 exactly
    attributes = with_attributes(ROW)
    for threshold, number in ((0.5, 0), (0.499, 4)):
        _, count = check_against_oracle(
            replace(attributes, confidenceThreshold=threshold),
            ROW,
            apart(4),
            NO_DELTAS,
            conf,
        )
        assert count.tolist() == [number]


def test_iou_at_the_threshold_survives():
    corners = [[0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 0.75, 1], [0, 0, 1, 0.25]]
    conf = np.zeros((1, 2, 4), np.float32)
    conf[0, 1] = [4, 3, 2, 1]
    attributes = with_attributes(ROW)
    detections, count = check_against_oracle(
        attributes, ROW, plane(corners), NO_DELTAS, conf
    )  # IoU with the first: 0.5, 0.75, 0.25
    assert count.tolist() == [3]
    assert detections[0, :3, [4, 3]].T.tolist() == [[1, 1], [0.5, 1], [1, 0.25]]


def test_top_k_counts_before_suppression():
    """The candidates beyond topK do not step in for suppressed ones."""
    corners = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]]
    conf = np.zeros((1, 2, 4), np.float32)
    conf[0, 1] = [4, 3, 2, 1]
    attributes = with_attributes(ROW, topK=3)
    _, count = check_against_oracle(attributes, ROW, plane(corners), NO_DELTAS, conf)
    assert count.tolist() == [2]


def test_empty_and_inverted_boxes_suppress_nothing():
    """Two equal boxes each of no width, of negative width, of negative width and height."""
    level = [(1, 1, 6)]
    corners = [[0.5, 0, 0.5, 1]] * 2 + [[0.75, 0, 0.25, 1]] * 2 + [[0.75, 1, 0.25, 0]] * 2
    conf = np.zeros((1, 2, 6), np.float32)
    conf[0, 1] = np.arange(6, 0, -1)
    attributes = with_attributes(level, topK=6, keepTopK=6, nmsThreshold=0.1)
    detections, count = check_against_oracle(
        attributes, level, plane(corners), np.zeros((1, 4, 6), np.float32), conf
    )
    assert count.tolist() == [6]
    assert detections[0, 2, 1:5].tolist() == [0, 0.75, 1, 0.25]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["background logit", "class logit", "shift", "stretch"])
def test_broken_values_void_their_prior_alone(value, where):
    loc, conf = np.zeros((2, 4, 4), np.float32), np.zeros((2, 3, 4), np.float32)
    tensor, row = {
        "background logit": (conf, 0),
        "class logit": (conf, 2),
        "shift": (loc, 1),
        "stretch": (loc, 3),
    }[where]
    tensor[1, row, 2] = value
    attributes = with_attributes(ROW, numClasses=3, keepTopK=12)
    _, count = check_against_oracle(attributes, ROW, apart(4), loc, conf)
    # exp(-inf) is 0: a box without height, finite and so no reason to drop it
    void = 0 if where == "stretch" and value == -np.inf else 2
    assert count.tolist() == [8, 8 - void]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codeType", 3),
        ("confSigmoid", 1),
        ("confSoftmax", 0),
        ("shareLocation", 0),
        ("varianceEncodedInTarget", 1),
        ("isNormalized", 0),
        ("inputOrder", (0, 7, 6)),
        ("topK", 0),
        ("keepTopK", -1),
        ("numClasses", 0),
        ("numLayers", 0),
        ("confidenceThreshold", -0.1),
        ("confidenceThreshold", float("nan")),
        ("nmsThreshold", 1.5),
        ("backgroundLabelId", 81),
        ("backgroundLabelId", -2),
    ],
)
def test_unsupported_attributes_are_refused_by_name(name, value):
    with pytest.raises(SurgeryError, match=name if name != "numLayers" else "inputOrder|numLayers"):
        replace(SSD, **{name: value})


def test_node_carries_what_nvidia_and_tensorrt_read():
    node = nms_node(input_names(6), SSD)
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert values.pop("plugin_version") == b"1"
    assert values.pop("plugin_namespace") == b""
    assert values == {
        "shareLocation": 1,
        "varianceEncodedInTarget": 0,
        "backgroundLabelId": 0,
        "numClasses": 81,
        "topK": 200,
        "keepTopK": 200,
        "confidenceThreshold": pytest.approx(0.05),
        "nmsThreshold": 0.5,
        "inputOrder": [0, 6, 12],
        "confSigmoid": 0,
        "confSoftmax": 1,
        "isNormalized": 1,
        "codeType": 1,
        "numLayers": 6,
    }


def test_old_opset_is_refused():
    with pytest.raises(SurgeryError, match="opset 18"):
        nms_function(6, 17)

"""NMS_OPT_TRT's definition in ONNX Runtime, against golden detections and brute force."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from onnx import helper

from graph_surgery.errors import SurgeryError
from graph_surgery.nms_function import nms_function
from tests.support.nms_cases import (
    LEVELS,
    SIGMOID,
    SSD,
    apart,
    cases,
    check_rows,
    columns_are_distinct,
    is_decided,
    make_model,
    plane,
    run,
    with_attributes,
)
from tests.support.nms_oracle import nms_opt


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


def check_against_oracle(attributes, levels, priors, loc, conf):
    actual = run(make_model(attributes, levels, priors, conf.dtype), levels, loc, conf)
    check_rows(*actual, *nms_opt(attributes, priors, loc, conf))
    return actual


@pytest.mark.slow
@given(cases())
def test_equals_brute_force(case):
    attributes, levels, priors, loc, conf = case
    assume(attributes.confSigmoid or columns_are_distinct(conf))
    assume(is_decided(attributes, priors, np.float32(loc), np.float32(conf)))
    check_against_oracle(attributes, levels, priors, loc, conf)


ROW = [(1, 1, 4)]
"""One level of four priors in a row."""

NO_DELTAS = np.zeros((1, 4, 4), np.float32)


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


def test_sigmoid_scores_do_not_depend_on_other_classes():
    """By hand: the sigmoid of ln 3, 0 and -ln 3 is 3/4, 1/2 and 1/4."""
    conf = np.float32(np.log(3)) * np.float32([[[1, 0, -1, -1], [1, 1, 0, -1], [0, 0, 1, 0]]])
    attributes = with_attributes(ROW, numClasses=3, confidenceThreshold=0.4, **SIGMOID)
    detections, count = check_against_oracle(attributes, ROW, apart(4), NO_DELTAS, conf)
    assert count.tolist() == [4]
    np.testing.assert_allclose(detections[0, :, 5], [0.75, 0.75, 0.75, 0.5], atol=1e-6)
    assert detections[0, :, 6].tolist() == [1, 1, 2, 1]


def test_softmax_body_has_no_sigmoid_and_the_reverse():
    """An engine reads the attributes, ONNX Runtime the body: each body holds one of the two."""
    kinds = {"Softmax", "Sigmoid"}
    for flag, kind in ((False, "Softmax"), (True, "Sigmoid")):
        flags = SIGMOID if flag else {}
        body = nms_function(replace(SSD, **flags), 18).node
        assert [node.op_type for node in body if node.op_type in kinds] == [kind]


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
        ("confSigmoid", 2),
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
    count = sum(a * h * w for a, h, w in LEVELS)
    (node,) = make_model(SSD, LEVELS, np.zeros((2, count * 4, 1))).graph.node
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
        nms_function(SSD, 17)

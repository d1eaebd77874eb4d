"""Version 2 of NMS_OPT_TRT in ONNX Runtime, against RetinaNet's golden tails and brute force."""

import hashlib
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from onnx import helper

from graph_surgery.errors import SurgeryError
from graph_surgery.nms_function import OURS, nms_function
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
from tests.support.retinanet_golden import check_golden, load_tail, retinanet_attributes


@pytest.mark.parametrize("case", ["1", "2", "3", "4", "800"])
def test_golden_tails(golden, case):
    tail = load_tail(golden, case)
    attributes = retinanet_attributes(tail.conf.shape[1])
    model = make_model(attributes, tail.levels, tail.priors)
    detections, count = run(model, tail.levels, tail.loc, tail.conf)
    for rows, used, expected in zip(detections, count, tail.expected, strict=True):
        check_golden(rows[:used], expected, tail.size)


@pytest.mark.parametrize(("name", "default"), [("clipBeforeNms", 0), ("bboxXformClip", 0.0)])
def test_each_attribute_decides_over_a_golden_tail(golden, name, default):
    """Without it other rows come out: neither is there for nothing."""
    tail = load_tail(golden, "1")
    attributes = retinanet_attributes(tail.conf.shape[1])
    model = make_model(replace(attributes, **{name: default}), tail.levels, tail.priors)
    detections, count = run(model, tail.levels, tail.loc, tail.conf)
    with pytest.raises(AssertionError):
        check_golden(detections[0][: count[0]], tail.expected[0], tail.size)


def check_against_oracle(attributes, levels, priors, loc, conf):
    actual = run(make_model(attributes, levels, priors, conf.dtype), levels, loc, conf)
    check_rows(*actual, *nms_opt(attributes, priors, loc, conf, levels))
    return actual


@pytest.mark.slow
@given(cases(version=2))
def test_equals_brute_force(case):
    attributes, levels, priors, loc, conf = case
    assume(attributes.confSigmoid or columns_are_distinct(conf))
    assume(is_decided(attributes, priors, np.float32(loc), np.float32(conf)))
    check_against_oracle(attributes, levels, priors, loc, conf)


TWO = [(1, 1, 4), (1, 1, 2)]
"""Levels of four and of two priors."""

CUT = {**SIGMOID, "numClasses": 2, "backgroundLabelId": -1, "keepTopK": 12}


def test_a_cut_counts_over_all_classes_of_its_level_alone():
    """By hand: the best two of a level, whatever their class; the other level keeps its own."""
    conf = np.float32([[[4, 3, -1, -1, 0, -1], [1, 3.5, -1, -1, -0.5, -0.25]]])
    attributes = with_attributes(TWO, levelTopK=2, topK=4, confidenceThreshold=0.1, **CUT)
    detections, count = check_against_oracle(
        attributes, TWO, apart(6), np.zeros((1, 4, 6), np.float32), conf
    )
    assert count.tolist() == [4]
    expected = 1 / (1 + np.exp(-np.float32([4, 3.5, 0, -0.25])))
    np.testing.assert_allclose(detections[0, :4, 5], expected, atol=1e-6)
    assert detections[0, :4, 6].tolist() == [0, 1, 0, 1]


def test_ties_at_a_cut_go_to_the_lower_class_then_prior():
    attributes = with_attributes(TWO, levelTopK=3, topK=6, **CUT)
    conf = np.zeros((1, 2, 6), np.float32)
    conf[0, 0, 1] = -9
    detections, count = check_against_oracle(
        attributes, TWO, apart(6), np.zeros((1, 4, 6), np.float32), conf
    )
    assert count.tolist() == [6]
    x = detections[0, :6, 2] * 6  # the priors stand at a sixth of the width each
    rows = list(zip(detections[0, :6, 6].tolist(), x.round(3).tolist(), strict=True))
    assert rows == [(0, 0), (0, 2), (0, 3), (0, 4), (0, 5), (1, 4)]


def test_of_equal_scores_the_finer_level_suppresses():
    same = [[0, 0, 0.5, 0.5]] * 6
    attributes = with_attributes(TWO, levelTopK=1, topK=2, **CUT)
    loc = np.zeros((1, 4, 6), np.float32)
    loc[0, 0, 4:] = 0.1  # a twentieth of the width to the right, by the variance
    conf = np.full((1, 2, 6), -9, np.float32)
    conf[0, 0] = 1
    detections, count = check_against_oracle(attributes, TWO, plane(same), loc, conf)
    assert count.tolist() == [1]
    assert detections[0, 0, 2] == 0


def test_void_priors_take_no_place_of_others():
    conf = np.float32([[[9, 2, 1, 0, -9, -9], [0, 0, 0, 0, -9, -9]]])
    loc = np.zeros((1, 4, 6), np.float32)
    loc[0, 1, 0] = np.nan
    attributes = with_attributes(TWO, levelTopK=2, topK=4, confidenceThreshold=0.6, **CUT)
    _, count = check_against_oracle(attributes, TWO, apart(6), loc, conf)
    assert count.tolist() == [2]


def test_boxes_are_clipped_before_suppression_where_it_is_said():
    """Beyond the border two boxes differ, IoU 1/3; within the image they are the same."""
    corners = [[-0.5, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0.6, 0, 0.8, 1], [0.6, 0, 0.7, 1]]
    level = [(1, 1, 4)]
    conf = np.float32([[[0] * 4, [3, 2, 1, -9]]])
    loc = np.zeros((1, 4, 4), np.float32)
    for clip, number in ((0, 3), (1, 2)):
        attributes = with_attributes(level, clipBeforeNms=clip, nmsThreshold=0.55)
        _, count = check_against_oracle(attributes, level, plane(corners), loc, conf)
        assert count.tolist() == [number]


@pytest.mark.parametrize("value", [30.0, np.inf])
def test_a_stretch_is_bounded(value):
    """Half of the prior's width at most, as far as the attribute goes; infinity, too."""
    level = [(1, 1, 4)]
    loc = np.zeros((1, 4, 4), np.float32)
    loc[0, 2] = value
    conf = np.float32([[[-9] * 4, [3, 2, 1, 0]]])
    attributes = with_attributes(level, bboxXformClip=float(np.log(1.5)))
    detections, count = check_against_oracle(attributes, level, apart(4), loc, conf)
    assert count.tolist() == [4]
    width = detections[0, 1:, 4] - detections[0, 1:, 2]
    np.testing.assert_allclose(width, 1.5 / 8, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{}, {"bboxXformClip": 4.0}, {"clipBeforeNms": 1}, {"levelTopK": 7, "topK": 42}]
)
def test_attributes_of_ours_are_written_where_one_is_not_its_default(change):
    count = sum(a * h * w for a, h, w in LEVELS)
    (node,) = make_model(replace(SSD, **change), LEVELS, np.zeros((2, count * 4, 1))).graph.node
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert values["plugin_version"] == (b"2" if change else b"1")
    defaults = {"levelTopK": 0, "clipBeforeNms": 0, "bboxXformClip": 0.0}
    wanted = defaults | {name: value for name, value in change.items() if name in OURS}
    assert {name: values[name] for name in OURS if name in values} == (wanted if change else {})


OF_VERSION_1 = {
    "softmax": "ad91e9cd5d8ca218776910b4f8951a637178bd5acdf4952e5bf884f3c71aa982",
    "sigmoid": "d14c21e86f5be94a2640df7491476f9f62ca52be70d8e4f50f54bd4e74c84b82",
}
"""SHA-256 of the definitions in the files of version 1, six levels, opset 18."""


@pytest.mark.parametrize(("name", "flags"), [("softmax", {}), ("sigmoid", SIGMOID)])
def test_definition_of_version_1_is_that_of_the_files(name, flags):
    """A file whose definition is another is refused: these bytes stay as they are."""
    function = nms_function(replace(SSD, **flags), 18)
    found = hashlib.sha256(function.SerializeToString(deterministic=True)).hexdigest()
    assert found == OF_VERSION_1[name]


def test_wide_heads_of_float16(golden):
    tail = load_tail(golden, "1")
    attributes = retinanet_attributes(tail.conf.shape[1])
    half = [tensor.astype(np.float16) for tensor in (tail.loc, tail.conf)]
    full = [tensor.astype(np.float32) for tensor in half]
    models = [make_model(attributes, tail.levels, tail.priors, kind) for kind in ("f2", "f4")]
    for a, b in zip(
        run(models[0], tail.levels, *half), run(models[1], tail.levels, *full), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"levelTopK": -1}, "levelTopK=-1"),
        ({"levelTopK": 100}, "topK=200 with levelTopK=100 and 6 levels .* only 600"),
        ({"clipBeforeNms": 2}, "clipBeforeNms=2"),
        ({"bboxXformClip": -1.0}, "bboxXformClip=-1.0"),
        ({"bboxXformClip": float("inf")}, "bboxXformClip=inf"),
        ({"bboxXformClip": float("nan")}, "bboxXformClip=nan"),
    ],
)
def test_what_the_definition_does_not_cover_is_refused(values, said):
    with pytest.raises(SurgeryError, match=said):
        replace(SSD, **values)


@pytest.mark.parametrize("opset", [20, onnx.defs.onnx_opset_version()])
def test_later_opsets(golden, opset):
    tail = load_tail(golden, "4")
    attributes = retinanet_attributes(tail.conf.shape[1])
    model = make_model(attributes, tail.levels, tail.priors, opset=opset)
    detections, count = run(model, tail.levels, tail.loc, tail.conf)
    for rows, used, expected in zip(detections, count, tail.expected, strict=True):
        check_golden(rows[:used], expected, tail.size)

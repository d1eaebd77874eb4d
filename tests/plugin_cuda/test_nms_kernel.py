"""The CUDA kernels against golden detections and the operator's definition in ONNX Runtime."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.nms_cases import (
    LEVELS,
    SIGMOID,
    SSD,
    cases,
    check_rows,
    columns_are_distinct,
    is_decided,
    make_model,
    plane,
    random_heads,
    run,
    with_attributes,
)
from tests.support.nms_oracle import nms_opt

torch = pytest.importorskip("torch")
from tests.support.nms_device import (  # noqa: E402
    FORMS,
    HALF,
    NCHW,
    Form,
    Heads,
    check_against_definition,
    in_form,
    run_kernel,
)

pytest_plugins = ("tests.support.nms_library",)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("nms_library"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
by_form = pytest.mark.parametrize("form", FORMS, ids=str)


@pytest.fixture(scope="module")
def golden_cases(golden):
    priors = plane(np.load(golden / "default_boxes.npz")["ltrb"])
    files = [np.load(golden / f"nms_{i}.npz") for i in (1, 2, 3)]
    loc, conf = (np.stack([file[name] for file in files]) for name in ("loc", "conf"))
    return files, priors, loc, conf


@by_form
def test_golden_detections(golden_cases, form):
    files, priors, loc, conf = golden_cases
    if form.conf == "int8":
        check_against_definition(SSD, (LEVELS, priors, loc, conf), form)
        return
    heads, _ = in_form(form, (LEVELS, priors, loc, conf))
    detections, count = run_kernel(SSD, heads)
    assert count.tolist() == [len(file["labels"]) for file in files]
    for n, (rows, used, file) in enumerate(zip(detections, count, files, strict=True)):
        assert (rows[:, 0] == n).all()
        assert rows[:used, 6].tolist() == file["labels"].tolist()
        np.testing.assert_allclose(rows[:used, 5], file["scores"], atol=1e-5)
        boxes = file["boxes_ltrb"].clip(0, 1)[:, [1, 0, 3, 2]]
        np.testing.assert_allclose(rows[:used, 1:5], boxes, atol=1e-5)
        assert (rows[used:, 1:] == [0, 0, 0, 0, 0, -1]).all()


@pytest.mark.parametrize("batch", [1, 7, 64, 256])
def test_an_image_does_not_depend_on_its_batch(golden_cases, batch):
    _, priors, loc, conf = golden_cases
    alone, number = run_kernel(SSD, in_form(HALF, (LEVELS, priors, loc, conf))[0])
    which = np.random.default_rng(batch).integers(3, size=batch)
    heads = in_form(HALF, (LEVELS, priors, loc[which], conf[which]))[0]
    detections, count = run_kernel(SSD, heads)
    assert count.tolist() == number[which].tolist()
    assert (detections[..., 0] == np.arange(batch)[:, None]).all()
    np.testing.assert_array_equal(detections[..., 1:], alone[which, :, 1:])


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(["nchw", "nhwc", "padded", "chw4", "chw32", "merged"]))
def test_equals_the_definition_and_brute_force(case, layout):
    attributes, levels, priors, loc, conf = case
    assume(attributes.confSigmoid or columns_are_distinct(conf))
    assume(is_decided(attributes, priors, np.float32(loc), np.float32(conf)))
    form = Form(layout, conf.dtype.name, loc.dtype.name)
    actual = run_kernel(attributes, Heads((levels, priors, loc, conf), form))
    expected = run(make_model(attributes, levels, priors, conf.dtype), levels, loc, conf)
    check_rows(*actual, *expected)
    check_rows(*actual, *nms_opt(attributes, priors, loc, conf))


@pytest.mark.parametrize("top_k", [1009, 1010, 1024])
@pytest.mark.parametrize("candidates", [1023, 1024, 1025, 1039, 1040])
def test_lists_about_to_overflow(candidates, top_k):
    levels = [(1, 1, candidates)]
    attributes = with_attributes(
        levels,
        numClasses=4,
        topK=top_k,
        keepTopK=1024,
        confidenceThreshold=0.0,
        nmsThreshold=0.9,
    )
    check_against_definition(attributes, random_heads(levels, 4, 2, spread=1.0))


@pytest.mark.parametrize("offset", [-4e6, -3e5, 3e5])
def test_large_logits(offset):
    levels = [(3, 9, 9)]
    _, priors, loc, conf = random_heads(levels, 21, 2)
    attributes = with_attributes(levels, numClasses=21, topK=50)
    check_against_definition(attributes, (levels, priors, loc, conf + np.float32(offset)))


EIGHT = [(1, 1, 1), (6, 5, 5), (2, 3, 7), (5, 9, 1), (3, 1, 11), (4, 13, 13), (1, 21, 3), (6, 1, 1)]
LARGE = [(6, 31, 33)]  # 6,138 priors
RETINA = [(9, 13, 13), (9, 7, 7), (9, 3, 3)]
RANDOM = {
    "eight odd levels": (EIGHT, 21, 7, {"topK": 5, "keepTopK": 200}, {}),
    "one prior": ([(1, 1, 1)], 2, 64, {"topK": 1, "keepTopK": 1}, {}),
    "two classes": ([(3, 9, 7), (6, 5, 5)], 2, 256, {"topK": 200, "keepTopK": 200}, {}),
    "81 classes": ([(4, 25, 25), (6, 13, 13)], 81, 7, {"topK": 200, "keepTopK": 200}, {}),
    "rows for 1000": ([(4, 25, 25)], 81, 2, {"topK": 1000, "keepTopK": 1000}, {}),
    "rows beyond candidates": ([(2, 5, 5)], 3, 5, {"topK": 5, "keepTopK": 1000}, {}),
    "best alone": ([(4, 13, 13)], 81, 7, {"topK": 200, "keepTopK": 1}, {}),
    "best of each class": ([(4, 13, 13)], 81, 7, {"topK": 1, "keepTopK": 200}, {}),
    "264 classes, sigmoid": (
        RETINA,
        264,
        3,
        {"topK": 1000, "keepTopK": 1000, "backgroundLabelId": -1, **SIGMOID},
        {"spread": 1.0},
    ),
    "264 classes, softmax": (RETINA, 264, 3, {"topK": 200, "keepTopK": 200}, {"spread": 3.0}),
    "background in the middle": (EIGHT, 21, 3, {"backgroundLabelId": 10, "topK": 200}, {}),
    "background last": (EIGHT, 21, 3, {"backgroundLabelId": 20, "topK": 200}, {}),
    "no background": (EIGHT, 21, 3, {"backgroundLabelId": -1, "topK": 200}, {}),
    "all above the threshold": (
        [(4, 9, 9), (6, 5, 5)],
        21,
        3,
        {"topK": 1000, "keepTopK": 1000, "confidenceThreshold": 0.0, "backgroundLabelId": -1},
        {"spread": 1.0},
    ),
    "all above the threshold, sigmoid": (
        [(4, 9, 9), (6, 5, 5)],
        21,
        3,
        {"topK": 200, "keepTopK": 1000, "confidenceThreshold": 0.0, **SIGMOID},
        {"spread": 1.0},
    ),
    "no candidate": (EIGHT, 21, 3, {"topK": 200, "keepTopK": 200}, {"background": 40.0}),
    "6,138 candidates of a class": (
        LARGE,
        3,
        2,
        {"topK": 200, "keepTopK": 200, "confidenceThreshold": 0.0},
        {"background": -5.0},
    ),
    "6,138 candidates, 1000 enter": (
        LARGE,
        3,
        2,
        {"topK": 1000, "keepTopK": 1000, "confidenceThreshold": 0.0, "nmsThreshold": 0.8},
        {"background": -5.0},
    ),
    "6,138 candidates of each of 20 classes": (
        LARGE,
        21,
        2,
        {"topK": 200, "keepTopK": 200, "confidenceThreshold": 0.0},
        {"spread": 1.0},
    ),
    "nothing is suppressed": (
        EIGHT,
        21,
        3,
        {"topK": 1000, "keepTopK": 200, "nmsThreshold": 1.0},
        {},
    ),
    "all overlaps suppress": (
        EIGHT,
        21,
        3,
        {"topK": 1000, "keepTopK": 200, "nmsThreshold": 0.0},
        {},
    ),
}


@pytest.mark.parametrize("form", [NCHW, Form("padded", "float16", "float16")], ids=str)
@pytest.mark.parametrize("name", RANDOM)
def test_random_heads(name, form):
    levels, classes, batch, attributes, options = RANDOM[name]
    attributes = with_attributes(levels, numClasses=classes, **({"keepTopK": 200} | attributes))
    case = random_heads(levels, classes, batch, **options)
    _, count = check_against_definition(attributes, case, form)
    assert count.any() == (name != "no candidate")


@by_form
def test_every_form_of_odd_levels(form):
    attributes = with_attributes(EIGHT, numClasses=21, topK=50, keepTopK=100)
    check_against_definition(attributes, random_heads(EIGHT, 21, 5), form)


@pytest.mark.parametrize("kind", [{}, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("form", [NCHW, Form("nhwc", "float16", "float16")], ids=str)
def test_equal_logits_go_by_class_then_prior(kind, form):
    """More equal candidates in a class than topK, and more than a list of them may hold."""
    levels = [(4, 21, 21), (1, 3, 3)]
    _, priors, loc, conf = random_heads(levels, 5, 2)
    conf = np.zeros_like(conf)
    attributes = with_attributes(levels, numClasses=5, topK=150, keepTopK=400, **kind)
    heads, (_, _, loc, conf) = in_form(form, (levels, priors, loc, conf))
    actual = run_kernel(attributes, heads)
    expected = run(make_model(attributes, levels, priors), levels, loc, conf)
    check_rows(*actual, *expected)
    assert (np.diff(actual[0][0, : actual[1][0], 6]) >= 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [form for form in FORMS if form.conf != "int8"], ids=str)
def test_broken_values_void_their_prior_alone(form, value):
    levels = [(4, 9, 9), (6, 3, 3)]
    _, priors, loc, conf = random_heads(levels, 21, 3)
    rng = np.random.default_rng(2)
    conf[rng.random(conf.shape) < 0.01] = value
    loc[rng.random(loc.shape) < 0.02] = value
    attributes = with_attributes(levels, numClasses=21, topK=100, keepTopK=500)
    check_against_definition(attributes, (levels, priors, loc, conf), form)


def test_nothing_but_broken_values():
    levels = [(4, 9, 9)]
    _, priors, loc, conf = random_heads(levels, 21, 2)
    attributes = with_attributes(levels, numClasses=21, topK=100, keepTopK=50)
    for kind in ({}, SIGMOID):
        heads = in_form(NCHW, (levels, priors, loc, conf * np.float32(np.nan)))[0]
        assert run_kernel(replace(attributes, **kind), heads)[1].tolist() == [0, 0]


def test_iou_at_the_threshold_and_boxes_without_area():
    """Coordinates are binary fractions, so that every implementation has the same IoU: 1/2."""
    corners = [[0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 0.75, 1], [0, 0, 1, 0.25]]
    corners += [[0.5, 0, 0.5, 1]] * 2 + [[0.75, 0, 0.25, 1]] * 2 + [[0.75, 1, 0.25, 0]] * 2
    level = [(1, 2, 5)]
    loc = np.zeros((1, 4, 10), np.float32)
    conf = np.zeros((1, 2, 10), np.float32)
    conf[0, 1] = np.arange(10, 0, -1) / 2
    attributes = with_attributes(level, topK=10, keepTopK=12)
    actual = run_kernel(attributes, Heads((level, plane(corners), loc, conf)))
    check_rows(*actual, *nms_opt(attributes, plane(corners), loc, conf))
    assert actual[1].tolist() == [9]
    shrunk = loc.copy()
    shrunk[0, 2:, ::2] = -np.inf  # exp(-inf) is 0: boxes without size
    actual = run_kernel(attributes, Heads((level, plane(corners), shrunk, conf)))
    check_rows(*actual, *nms_opt(attributes, plane(corners), shrunk, conf))

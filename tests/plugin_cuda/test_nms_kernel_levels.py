"""Version 2 of NMS_OPT_TRT by the CUDA kernels, against golden tails, definition, brute force."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.nms_cases import (
    SIGMOID,
    apart,
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
from tests.support.retinanet_golden import check_golden, load_tail, retinanet_attributes

torch = pytest.importorskip("torch")
from tests.support.nms_device import (  # noqa: E402
    FORMS,
    HALF,
    NCHW,
    Bound,
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

NHWC = Form("nhwc", "float32", "float32")
ROUNDED = [HALF, Form("padded", "float16", "float16"), Form("nhwc", "int8", "float16")]


@pytest.mark.parametrize("form", [NCHW, NHWC], ids=str)
@pytest.mark.parametrize("case", ["1", "2", "3", "4", "800"])
def test_golden_tails(golden, case, form):
    tail = load_tail(golden, case)
    attributes = retinanet_attributes(tail.conf.shape[1])
    heads = in_form(form, (tail.levels, tail.priors, tail.loc, tail.conf))[0]
    detections, count = run_kernel(attributes, heads)
    for rows, used, expected in zip(detections, count, tail.expected, strict=True):
        check_golden(rows[:used], expected, tail.size)


@pytest.mark.parametrize("form", ROUNDED, ids=str)
@pytest.mark.parametrize("case", ["1", "2", "800"])
def test_golden_tails_in_other_types(golden, case, form):
    tail = load_tail(golden, case)
    attributes = retinanet_attributes(tail.conf.shape[1])
    check_against_definition(attributes, (tail.levels, tail.priors, tail.loc, tail.conf), form)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(version=2), st.sampled_from(["nchw", "nhwc", "padded", "chw4", "chw32", "merged"]))
def test_equals_the_definition_and_brute_force(case, layout):
    attributes, levels, priors, loc, conf = case
    assume(attributes.confSigmoid or columns_are_distinct(conf))
    assume(is_decided(attributes, priors, np.float32(loc), np.float32(conf)))
    form = Form(layout, conf.dtype.name, loc.dtype.name)
    actual = run_kernel(attributes, Heads((levels, priors, loc, conf), form))
    check_rows(*actual, *run(make_model(attributes, levels, priors, conf.dtype), levels, loc, conf))
    check_rows(*actual, *nms_opt(attributes, priors, loc, conf, levels))


def cut(levels, most, **attributes):
    """RetinaNet's attributes with a cut of `most`."""
    ours = {"levelTopK": most, "topK": most * len(levels), "clipBeforeNms": 1}
    return with_attributes(
        levels,
        **({"backgroundLabelId": -1, "keepTopK": 300, **SIGMOID, **ours} | attributes),
    )


PYRAMID = [(9, 13, 13), (9, 7, 7), (9, 4, 4), (9, 2, 2), (9, 1, 1)]
ONE = [(9, 31, 33)]  # 9,207 priors
RANDOM = {
    "264 classes": (PYRAMID, 264, 3, {"most": 1000}, {"spread": 1.0}),
    "few classes, all candidates": (
        PYRAMID,
        3,
        3,
        {"most": 1000, "confidenceThreshold": 0.0},
        {"spread": 1.0},
    ),
    "a cut of one": (PYRAMID, 21, 3, {"most": 1}, {}),
    "a cut of 1,024 of eight levels": (PYRAMID + PYRAMID[:3], 12, 2, {"most": 1024}, {}),
    "more than a list of a level holds": (ONE, 5, 2, {"most": 1000}, {"spread": 1.0}),
    "a part of a class and more": (
        ONE,
        2,
        2,
        {"most": 1024, "nmsThreshold": 0.9, "backgroundLabelId": 0},
        {},
    ),
    "all classes but the background": (ONE, 6, 2, {"most": 700, "backgroundLabelId": 3}, {}),
    "a class with more than its list holds": (
        [(9, 15, 15)] * 3,
        2,
        2,
        {"most": 1000, "nmsThreshold": 0.95, "keepTopK": 1024, "backgroundLabelId": 1},
        {},
    ),
    "all of a class stay": (
        [(9, 9, 9)] * 2,
        1,
        2,
        {"most": 500, "nmsThreshold": 1.0, "keepTopK": 1024},
        {},
    ),
    "softmax": (PYRAMID, 21, 3, {"most": 200, "confSigmoid": 0, "confSoftmax": 1}, {}),
    "a bound": (PYRAMID, 21, 3, {"most": 500, "bboxXformClip": 0.1}, {}),
    "boxes not clipped": (PYRAMID, 21, 3, {"most": 500, "clipBeforeNms": 0}, {}),
    "nothing is suppressed": (PYRAMID, 4, 2, {"most": 600, "nmsThreshold": 1.0}, {}),
    "all overlaps suppress": (PYRAMID, 4, 2, {"most": 600, "nmsThreshold": 0.0}, {}),
    "no candidate": (PYRAMID, 4, 2, {"most": 600, "confidenceThreshold": 1.0}, {}),
}


@pytest.mark.parametrize("form", [NCHW, ROUNDED[1]], ids=str)
@pytest.mark.parametrize("name", RANDOM)
def test_random_heads(name, form):
    levels, classes, batch, values, options = RANDOM[name]
    attributes = cut(levels, values["most"], numClasses=classes, **values_but(values, "most"))
    case = random_heads(levels, classes, batch, **options)
    _, count = check_against_definition(attributes, case, form)
    assert count.any() == (name != "no candidate")


def values_but(values, name):
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_odd_levels(form):
    levels = [(1, 1, 1), (6, 5, 5), (2, 3, 7), (5, 9, 1), (4, 13, 13), (1, 21, 3)]
    attributes = cut(levels, 300, numClasses=21, bboxXformClip=0.2)
    check_against_definition(attributes, random_heads(levels, 21, 5), form)


@pytest.mark.parametrize("ours", [{"clipBeforeNms": 1}, {"bboxXformClip": 0.1}], ids=str)
@pytest.mark.parametrize("form", [NCHW, HALF], ids=str)
def test_attributes_without_a_cut(form, ours):
    """As an SSD may have them: softmax, topK of each class."""
    levels = [(4, 9, 9), (6, 5, 5)]
    case = random_heads(levels, 21, 3)
    attributes = with_attributes(levels, numClasses=21, topK=100, keepTopK=200, **ours)
    with_it, _ = check_against_definition(attributes, case, form)
    without, _ = check_against_definition(
        replace(attributes, clipBeforeNms=0, bboxXformClip=0.0), case, form
    )
    assert with_it.tobytes() != without.tobytes()


@pytest.mark.parametrize("candidates", [998, 1000, 1001, 1002, 2048])
def test_a_cut_about_to_decide(candidates):
    levels = [(1, 1, candidates), (2, 1, 1)]
    attributes = cut(levels, 1000, numClasses=1, confidenceThreshold=0.0, keepTopK=1024)
    check_against_definition(attributes, random_heads(levels, 1, 2, spread=1.0))


@pytest.mark.parametrize("level", [(7, 31, 151), (2, 1, 16384), (9, 11, 331)])
def test_a_list_of_a_level_about_to_overflow(level):
    """32,767 to 32,769 candidates: from the list, and from the logits."""
    levels = [level]
    attributes = cut(levels, 40, numClasses=1, confidenceThreshold=0.0)
    check_against_definition(attributes, random_heads(levels, 1, 1, spread=1.0))


@pytest.mark.parametrize("size", [9, 91])
@pytest.mark.parametrize("form", [NCHW, Form("nhwc", "float16", "float16")], ids=str)
def test_ties_at_a_cut_go_to_the_lower_class_then_prior(form, size):
    """All scores are equal: 405 and 41,405 of them, from the list and from the logits."""
    levels = [(1, size, size), (1, 2, 2)]
    count = sum(a * h * w for a, h, w in levels)
    conf = np.zeros((2, 5, count), np.float32)
    conf[:, 0, ::2] = -9
    case = (levels, apart(count), np.zeros((2, 4, count), np.float32), conf)
    attributes = cut(levels, 50, numClasses=5, keepTopK=400)
    heads, (_, priors, loc, conf) = in_form(form, case)
    actual = run_kernel(attributes, heads)
    check_rows(*actual, *run(make_model(attributes, levels, priors), levels, loc, conf))
    assert (np.diff(actual[0][0, : actual[1][0], 6]) >= 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [NCHW, Form("padded", "float16", "float16")], ids=str)
def test_broken_values_take_no_place_of_others(form, value):
    levels = [(4, 9, 9), (6, 3, 3)]
    _, priors, loc, conf = random_heads(levels, 21, 3)
    rng = np.random.default_rng(2)
    conf[rng.random(conf.shape) < 0.01] = value
    loc[rng.random(loc.shape) < 0.02] = value
    attributes = cut(levels, 60, numClasses=21, bboxXformClip=0.3)
    check_against_definition(attributes, (levels, priors, loc, conf), form)


def test_boxes_beyond_the_border_are_told_apart_unless_clipped():
    """By hand: the first two are one within the image, and of the last two nothing is in it."""
    corners = [[-0.5, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [2, 0, 3, 1], [2, 0, 3, 1]]
    level = [(1, 1, 4)]
    logits = np.float32([3, 2, 1, 0])
    case = (level, plane(corners), np.zeros((1, 4, 4), np.float32), logits[None, None])
    for clip, stay in ((0, [0, 1, 2]), (1, [0, 2, 3])):
        attributes = cut(level, 4, numClasses=1, clipBeforeNms=clip, nmsThreshold=0.55)
        detections, count = check_against_definition(attributes, case)
        scores = 1 / (1 + np.exp(-logits[stay]))
        np.testing.assert_allclose(detections[0, : count[0], 5], scores, atol=1e-6)


@pytest.fixture(scope="module")
def images():
    """Heads of three images on which cuts decide."""
    return random_heads(PYRAMID, 40, 3, seed=5)


CUTS = cut(PYRAMID, 300, numClasses=40, bboxXformClip=0.5)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("form", [HALF, Form("nhwc", "float16", "float16")], ids=str)
def test_an_image_does_not_depend_on_its_batch(images, batch, form):
    levels, priors, loc, conf = images
    alone, number = run_kernel(CUTS, in_form(form, images)[0])
    which = np.random.default_rng(batch).integers(3, size=batch)
    heads = in_form(form, (levels, priors, loc[which], conf[which]))[0]
    detections, count = run_kernel(CUTS, heads)
    assert count.tolist() == number[which].tolist()
    np.testing.assert_array_equal(detections[..., 1:], alone[which, :, 1:])


def test_runs_are_bit_identical_whatever_memory_held(images):
    bound = Bound(in_form(HALF, images)[0].plan(CUTS))
    first, number = bound().result()
    for garbage in (0xFF, 0x00, 0x7F, None, None):
        bound.spoil(garbage)
        again, count = bound().result()
        assert again.tobytes() == first.tobytes()
        assert count.tolist() == number.tolist()


def test_a_cuda_graph_replays_on_changed_inputs(images):
    levels, priors, loc, conf = images
    made = [in_form(HALF, (levels, priors, loc[w], conf[w]))[0] for w in ([0, 1], [2, 0])]
    expected = [run_kernel(CUTS, heads) for heads in made]
    contents = [[buffer.clone() for buffer in heads.buffers] for heads in made]
    bound = Bound(made[0].plan(CUTS))
    bound().result()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound()
    for content, (detections, count) in (*zip(contents, expected, strict=True),) * 2:
        for buffer, data in zip(made[0].buffers, content, strict=True):
            buffer.copy_(data)
        bound.spoil(None)
        graph.replay()
        actual = bound.result()
        assert actual[0].tobytes() == detections.tobytes()
        assert actual[1].tolist() == count.tolist()


PATHS = {  # levels, classes, values, options of random_heads
    "lists of levels": (PYRAMID[1:], 5, {"most": 60}, {}),
    "all candidates go on": (PYRAMID[2:], 5, {"most": 200}, {}),
    "from the logits": ([(9, 35, 35)], 4, {"most": 90, "confidenceThreshold": 0.0}, {}),
    "parts of a class": ([(9, 9, 9)] * 2, 2, {"most": 700, "confidenceThreshold": 0.0}, {}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", [NCHW, ROUNDED[1], Form("chw4", "int8", "float32")], ids=str)
def test_every_path(form, path):
    """Small enough for compute-sanitizer; memory is left as allocated, for its initcheck."""
    levels, classes, values, options = PATHS[path]
    attributes = cut(levels, values["most"], numClasses=classes, **values_but(values, "most"))
    case = random_heads(levels, classes, 2, **options)
    heads = in_form(form, case)[0]
    first = Bound(heads.plan(attributes), spoiled=False)().result()
    assert (first[1] > 0).all()
    again = check_against_definition(attributes, case, form)
    assert again[0].tobytes() == first[0].tobytes()

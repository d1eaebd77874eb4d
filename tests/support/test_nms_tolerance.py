"""The comparison of detections forgives what hangs on rounding, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings

from tests.support.nms_cases import (
    LEVELS,
    SSD,
    apart,
    cases,
    columns_are_distinct,
    is_decided,
    make_model,
    plane,
    run,
    with_attributes,
)
from tests.support.nms_oracle import decode, decode_all, iou, iou_matrix, nms_opt, sigmoid, softmax
from tests.support.nms_tolerance import check_same, undecided_rows

ROW = [(1, 1, 4)]
NO_DELTAS = np.zeros((1, 4, 4), np.float32)


def result_of(attributes, priors, loc, conf):
    return nms_opt(
        loc,
        conf,
        priors,
        top_k=attributes.topK,
        keep_top_k=attributes.keepTopK,
        confidence_threshold=attributes.confidenceThreshold,
        nms_threshold=attributes.nmsThreshold,
        background=attributes.backgroundLabelId,
    )


def nothing(_image):
    return np.empty((0, 6))


def scores_are_apart(attributes, conf):
    """Whether scores differ by more than any rounding, unless the same numbers make them."""
    columns = np.unique(np.moveaxis(conf, 1, -1).reshape(-1, conf.shape[1]), axis=0)
    with np.errstate(all="ignore"):
        if attributes.confSigmoid:
            scores = sigmoid(np.unique(np.float64(columns)))
        else:
            made = softmax(np.float64(columns.T[None]))[0].T
            scores = np.concatenate([np.unique(one[one > 0]) for one in made])
    return bool((np.diff(np.sort(scores[np.isfinite(scores)])) > 2e-6).all())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_nothing_is_undecided_where_no_decision_is_close(case):
    attributes, _, priors, loc, conf = case
    assume(attributes.confSigmoid or columns_are_distinct(conf))
    assume(scores_are_apart(attributes, conf))
    assume(is_decided(attributes, priors, np.float32(loc), np.float32(conf)))
    for image in range(len(conf)):
        assert len(undecided_rows(loc[image], conf[image], priors, attributes)) == 0


def test_arrays_equal_the_loops():
    rng = np.random.default_rng(1)
    priors = plane(np.sort(rng.random((30, 2, 2)), axis=1).reshape(30, 4))
    loc = rng.normal(size=(2, 4, 30)).astype(np.float32)
    boxes = decode(loc, priors)
    np.testing.assert_allclose(decode_all(loc, priors), boxes, atol=1e-6)
    boxes[0, :3, 2] = boxes[0, :3, 0] - 0.1  # inverted
    expected = [[iou(a, b) for b in boxes[0]] for a in boxes[0]]
    np.testing.assert_allclose(iou_matrix(boxes[0]), expected, atol=1e-6)


@pytest.fixture(scope="module")
def real_case(golden):
    priors = plane(np.load(golden / "default_boxes.npz")["ltrb"])
    case = np.load(golden / "nms_3.npz")
    loc, conf = case["loc"][None].astype(np.float32), case["conf"][None].astype(np.float32)
    return priors, loc, conf, run(make_model(SSD, LEVELS, priors), LEVELS, loc, conf)


def test_few_rows_of_a_real_case_are_undecided(real_case):
    priors, loc, conf, _ = real_case
    assert len(undecided_rows(loc[0], conf[0], priors, SSD)) <= 4


@pytest.mark.parametrize(
    "damage", ["drop", "add", "swap", "label", "score", "box", "tail", "image", "count"]
)
def test_damage_to_a_real_case_is_found(real_case, damage):
    priors, loc, conf, (expected, count) = real_case
    rows, number = expected.copy(), count.copy()
    if damage == "drop":
        rows[0, 50:-1] = expected[0, 51:]
        rows[0, -1] = [0, 0, 0, 0, 0, 0, -1]
        number[0] -= 1
    elif damage == "add":
        rows[0, 51:] = expected[0, 50:-1]
    elif damage == "swap":
        gap = np.flatnonzero(np.diff(expected[0, :, 5]) < -5e-6)[0]
        rows[0, [gap, gap + 1]] = expected[0, [gap + 1, gap]]
    elif damage == "tail":
        rows[0, -1] = [0, 0, 0, 0, 0, 0, -1]
    elif damage == "count":
        number[0] -= 1
    else:
        column, change = {"label": (6, 1), "score": (5, -2e-5), "box": (3, 2e-5), "image": (0, 1)}[
            damage
        ]
        rows[0, 50, column] += change if damage != "box" or rows[0, 50, 3] < 0.5 else -change

    def undecided(image):
        return undecided_rows(loc[image], conf[image], priors, SSD)

    check_same((expected, count), (expected, count), undecided)
    with pytest.raises(AssertionError):
        check_same((rows, number), (expected, count), undecided)


def logits(scores):
    """Two classes, the second with these scores, as logits [1, 2, P]."""
    p = np.float64(scores)
    return np.float32(np.stack([0 * p, np.log(p / (1 - p))])[None])


def check_both(attributes, priors, conf, variant):
    """A result and one with `variant` of the attributes are the same but for undecided rows."""
    one, other = (result_of(a, priors, NO_DELTAS, conf) for a in (attributes, variant))
    check_same(one, other, lambda n: undecided_rows(NO_DELTAS[n], conf[n], priors, attributes))
    with pytest.raises(AssertionError):
        check_same(one, other, nothing)


def test_a_score_at_the_threshold_may_count_or_not():
    attributes = with_attributes(ROW, confidenceThreshold=0.3 - 4e-7)
    variant = replace(attributes, confidenceThreshold=0.3 + 4e-7)
    check_both(attributes, apart(4), logits([0.9, 0.3, 0.1, 0.5]), variant)
    near, far = (replace(attributes, confidenceThreshold=t) for t in (0.29, 0.31))
    with pytest.raises(AssertionError):
        check_both(near, apart(4), logits([0.9, 0.3, 0.1, 0.5]), far)


def test_an_iou_at_the_threshold_may_suppress_or_not_and_others_follow():
    """The second overlaps the first by 1/2; where it stays it suppresses the third."""
    corners = [[0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 0.4, 1], [0, 0, 0.1, 0.1]]
    attributes = with_attributes(ROW, nmsThreshold=0.5 - 4e-6)
    conf = logits([0.9, 0.8, 0.7, 0.6])
    check_both(attributes, plane(corners), conf, replace(attributes, nmsThreshold=0.5 + 4e-6))
    near, far = (replace(attributes, nmsThreshold=t) for t in (0.45, 0.55))
    with pytest.raises(AssertionError):
        check_both(near, plane(corners), conf, far)


@pytest.mark.parametrize("limit", ["topK", "keepTopK"])
def test_of_close_scores_either_may_be_the_last(limit):
    attributes = with_attributes(ROW, **{limit: 2})
    pair = [logits([0.9, 0.5, 0.5 + sign * 3e-7, 0.2]) for sign in (1, -1)]
    one, other = (result_of(attributes, apart(4), NO_DELTAS, conf) for conf in pair)
    assert one[0][0, 1].tolist() != other[0][0, 1].tolist()
    check_same(one, other, lambda n: undecided_rows(NO_DELTAS[n], pair[0][n], apart(4), attributes))


def test_equal_logits_tie_for_certain():
    attributes = with_attributes(ROW, topK=2)
    conf = logits([0.5, 0.5, 0.5, 0.5])
    assert len(undecided_rows(NO_DELTAS[0], conf[0], apart(4), attributes)) == 0
    expected = result_of(attributes, apart(4), NO_DELTAS, conf)
    rows = expected[0].copy()
    rows[0, [0, 1]] = rows[0, [1, 0]]
    with pytest.raises(AssertionError, match="order"):
        check_same((rows, expected[1]), expected, nothing)

"""The comparison of detections forgives what hangs on rounding, and nothing else."""

import numpy as np
import pytest
from hypothesis import assume, given, settings

from tests.support.nms_cases import (
    LEVELS,
    SSD,
    cases,
    columns_are_distinct,
    is_decided,
    make_model,
    plane,
    run,
)
from tests.support.nms_oracle import decode, decode_all, sigmoid, softmax
from tests.support.nms_tolerance import check_same, undecided


def scores_are_apart(attributes, conf):
    """Whether scores differ by more than any rounding, unless the same numbers make them."""
    columns = np.unique(np.moveaxis(conf, 1, -1).reshape(-1, conf.shape[1]), axis=0)
    with np.errstate(all="ignore"):
        if attributes.confSigmoid:
            scores = sigmoid(np.unique(np.float64(columns)))
        else:
            made = softmax(np.float64(columns.T[None]))[0].T
            scores = np.concatenate([np.unique(one[one > 0]) for one in made])
    return bool((np.diff(np.sort(scores[np.isfinite(scores)])) > 2e-5).all())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_nothing_is_undecided_where_no_decision_is_close(case):
    attributes, _, priors, loc, conf = case
    assume(attributes.confSigmoid or columns_are_distinct(conf))
    assume(scores_are_apart(attributes, conf))
    assume(not (np.abs(loc) > 100).any())  # a corner so far away is rounded by more than an IoU
    assume(is_decided(attributes, priors, np.float32(loc), np.float32(conf)))
    for image in range(len(conf)):
        assert len(undecided(loc[image], conf[image], priors, attributes).rows) == 0


def test_boxes_in_arrays_equal_the_loops():
    rng = np.random.default_rng(1)
    priors = plane(np.sort(rng.random((30, 2, 2)), axis=1).reshape(30, 4))
    loc = rng.normal(size=(2, 4, 30)).astype(np.float32)
    boxes = decode(loc, priors)
    np.testing.assert_allclose(decode_all(loc, priors), boxes, atol=1e-6)


@pytest.fixture(scope="module")
def real_case(golden):
    priors = plane(np.load(golden / "default_boxes.npz")["ltrb"])
    case = np.load(golden / "nms_3.npz")
    loc, conf = case["loc"][None].astype(np.float32), case["conf"][None].astype(np.float32)
    return priors, loc, conf, run(make_model(SSD, LEVELS, priors), LEVELS, loc, conf)


def test_few_rows_of_a_real_case_are_undecided(real_case):
    priors, loc, conf, _ = real_case
    assert len(undecided(loc[0], conf[0], priors, SSD).rows) <= 4


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

    def doubtful(image):
        return undecided(loc[image], conf[image], priors, SSD)

    check_same((expected, count), (expected, count), doubtful)
    with pytest.raises(AssertionError):
        check_same((rows, number), (expected, count), doubtful)

"""Which detections hang on rounding, and a comparison that forgives exactly those.

Two implementations that round a softmax or a box differently may decide differently when a score
lies within SCORE_ROUNDING of the threshold or of the score of another candidate, or an IoU within
IOU_ROUNDING of its threshold. `undecided_rows` follows these decisions through ranks, suppression
and the final choice: what it does not name is the same for every correct implementation.
"""

from collections.abc import Callable

import numpy as np

from tests.support.nms_oracle import decode_all, iou_matrix, sigmoid, softmax

SCORE_ROUNDING = 1e-6
# A corner near 1 is rounded by 6e-8 and exp by as much again; on a box 0.07 wide, the smallest of
# SSD-ResNet34, this moves an IoU by some 1e-6.
IOU_ROUNDING = 1e-5
ZERO = 2.0**-150  # half the least float32: a score up to it is 0 for everyone
TOLERANCE = 1e-5
OUT, PERHAPS, IN = range(3)


def ranks(score, same, sure):
    """How many candidates come before each, in any correct order: at least, at most.

    The candidates are given in the order of the operator. `same` numbers groups whose scores are
    the same function of the same numbers: within a group the order is certain. `sure` says which
    are candidates without doubt.
    """
    ascending = np.sort(score)
    ascending_sure = np.sort(score[sure])
    by_group = np.argsort(same, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(same[by_group]) != 0])
    sizes = np.diff(np.r_[starts, len(same)])
    before = np.empty(len(same), int)
    before[by_group] = np.arange(len(same)) - np.repeat(starts, sizes)
    behind = np.empty(len(same), int)
    behind[by_group] = np.repeat(sizes, sizes) - 1
    behind -= before
    sure_above = len(ascending_sure) - np.searchsorted(
        ascending_sure, score + SCORE_ROUNDING, "right"
    )
    at_least = sure_above + np.where(sure, before, 0)
    not_below = len(score) - np.searchsorted(ascending, score - SCORE_ROUNDING, "left")
    return at_least, not_below - 1 - behind


def suppression(boxes, score, same, first, iou_threshold):
    """Fate of the candidates of a class, in order: OUT, PERHAPS or IN.

    `first`: who enters suppression without doubt.
    """
    overlap = iou_matrix(boxes)
    surely = overlap > iou_threshold + IOU_ROUNDING
    perhaps = overlap > iou_threshold - IOU_ROUNDING
    np.fill_diagonal(perhaps, False)
    fate = np.full(len(boxes), PERHAPS)
    for i in range(len(boxes)):
        others = np.flatnonzero(perhaps[i] & (fate != OUT))
        tied = same[others] == same[i]
        gap = score[others] - score[i]
        before = np.where(tied, others < i, gap > SCORE_ROUNDING)
        behind = np.where(tied, others > i, gap < -SCORE_ROUNDING)
        if (before & surely[i, others] & (fate[others] == IN)).any():
            fate[i] = OUT
        elif first[i] and behind.all():
            fate[i] = IN
    return fate


def undecided_rows(loc, conf, priors, attributes) -> np.ndarray:
    """Rows (ymin, xmin, ymax, xmax, score, label) that a correct result may hold or lack.

    `loc` [4, P] and `conf` [C, P] are those of one image.
    """
    threshold = attributes.confidenceThreshold
    activation = sigmoid if attributes.confSigmoid else softmax
    boxes = decode_all(loc[None], priors)[0]
    scores = activation(np.float64(conf[None]))[0]
    usable = np.isfinite(conf).all(axis=0) & np.isfinite(boxes).all(axis=1)
    # a number for every column of logits (softmax); with the logit it determines a score
    column = 0
    if not attributes.confSigmoid:
        column = np.unique(np.float32(conf).T, axis=0, return_inverse=True)[1].reshape(-1)
    logit = np.unique(np.float32(conf), return_inverse=True)[1].reshape(conf.shape)
    same = column * (logit.max() + 1) + logit
    found = []
    for label in range(len(conf)):
        if label == attributes.backgroundLabelId:
            continue
        least = max(threshold - SCORE_ROUNDING, ZERO)
        prior = np.flatnonzero(usable & (scores[label] > least))
        prior = prior[np.lexsort((prior, -scores[label, prior]))]
        score, ties = scores[label, prior], same[label, prior]
        at_least, at_most = ranks(score, ties, score > threshold + SCORE_ROUNDING)
        last = at_least < attributes.topK
        first = (at_most < attributes.topK) & (score > threshold + SCORE_ROUNDING)
        prior, score, ties, first = prior[last], score[last], ties[last], first[last]
        fate = suppression(boxes[prior], score, ties, first, attributes.nmsThreshold)
        kept = fate != OUT
        labels = np.full(kept.sum(), label)
        found.append((score[kept], labels, prior[kept], ties[kept], fate[kept]))
    if not found:
        return np.empty((0, 6))
    score, labels, prior, ties, fate = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((prior, labels, -score))
    score, labels, prior, ties, fate = (part[order] for part in (score, labels, prior, ties, fate))
    at_least, at_most = ranks(score, ties, fate == IN)
    certain = (fate == IN) & (at_most < attributes.keepTopK)
    doubtful = (at_least < attributes.keepTopK) & ~certain
    corners = boxes[prior[doubtful]].clip(0, 1)[:, [1, 0, 3, 2]]
    return np.column_stack([corners, score[doubtful], labels[doubtful]])


def match(rows, others) -> np.ndarray:
    """For each row the index of its own counterpart, -1 without one: label, score and box agree."""
    result = np.full(len(rows), -1)
    free = np.ones(len(others), bool)
    for i, row in enumerate(rows):
        fits = free & (others[:, 5] == row[5])
        fits &= (np.abs(others[:, :5] - row[:5]) <= TOLERANCE).all(axis=1)
        if fits.any():
            distance = np.abs(others[:, :5] - row[:5]).max(axis=1)
            result[i] = np.where(fits, distance, np.inf).argmin()
            free[result[i]] = False
    return result


def check_rows_of_image(rows, expected, undecided: Callable[[], np.ndarray]) -> None:
    """Compare the used rows of an image, (ymin, xmin, ymax, xmax, score, label)."""
    assert (np.diff(rows[:, 4]) <= 0).all(), "scores do not descend"
    if np.array_equal(rows[:, 5], expected[:, 5]) and np.allclose(
        rows, expected, rtol=0, atol=TOLERANCE
    ):
        return
    partner = match(rows, expected)
    lone = np.setdiff1d(np.arange(len(expected)), partner)
    excess = np.concatenate([rows[partner < 0], expected[lone]])
    if len(excess):
        doubtful = undecided()
        explained = match(excess, doubtful) >= 0
        assert explained.all(), f"rows that differ: {excess[~explained][:5]}"
    i, k = np.triu_indices((partner >= 0).sum(), 1)
    own, theirs = rows[partner >= 0, 4], partner[partner >= 0]
    reversed_ = theirs[i] > theirs[k]
    gap = np.abs(expected[theirs[i], 4] - expected[theirs[k], 4])
    tied = (gap == 0) & (own[i] == own[k])
    wrong = reversed_ & ((gap > SCORE_ROUNDING) | tied)
    assert not wrong.any(), f"rows in the wrong order: {i[wrong][:5]} before {k[wrong][:5]}"


def check_same(actual, expected, undecided: Callable[[int], np.ndarray]) -> None:
    """Compare (detections, num_detections); `undecided` gives the `undecided_rows` of an image."""
    detections, count = actual
    expected_detections, expected_count = expected
    assert detections.dtype == np.float32
    assert count.dtype == np.int32
    assert detections.shape == expected_detections.shape
    assert count.shape == expected_count.shape
    assert ((count >= 0) & (count <= detections.shape[1])).all()
    for n, (rows, other) in enumerate(zip(detections, expected_detections, strict=True)):
        assert (rows[:, 0] == n).all()
        assert (rows[count[n] :, 1:] == [0, 0, 0, 0, 0, -1]).all()
        check_rows_of_image(
            rows[: count[n], 1:], other[: expected_count[n], 1:], lambda n=n: undecided(n)
        )

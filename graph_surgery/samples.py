"""Head tensors on which the proof of a surgery runs the old tail and the new node.

What a tail may do to boxes and scores shows only on boxes and scores that provoke it, so these
are spread on purpose: scores over 0 to 1 and closing in on the threshold from both sides, two
classes on one prior, overlapping neighbours, equal scores; boxes from a hair to many images wide,
some out of the image. Left out are

* NaN and infinity, for which the operator has a rule and tails in the wild have none;
* equal scores of different classes, which are equal only up to the order of the softmax's sum;
* equal scores of priors that the graph has in another order than the operator.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.tail import DetectionTail

Floats = NDArray[np.float32]
Image = tuple[Floats, Floats]
"""Deltas [4, P] and logits [C, P]."""

SPARSE_IMAGES = 4

RUN = 3
"""Neighbouring priors with a candidate of one class: two of equal score and one of another."""

SECOND_SHARE = 0.37
"""Of the probability that a candidate leaves over, what goes to a second class of its prior."""

SMALL, LARGE = 0.1, 5.0
"""Standard deviations of a shift, in sizes of the prior, and of the logarithm of a stretch."""

BEHIND = 8
"""At most so many of a level's candidates are within the cut and of low score, and as many behind
it."""

TIED = 7
"""Candidates of equal score in a crowd; a topK of 200 ends within such a group."""


def proof_images(tail: DetectionTail) -> list[Image]:
    """Make seeded images for a tail.

    One without candidates; some with so few that each which survives is a detection; one with
    more than keepTopK detections; and, unless the tail caps its classes after suppression, one
    with a class of more than topK candidates. The others keep every class below topK. For a cut of
    levels there are images in which it decides over rows: one for each level, and one for all.

    Raises
    ------
    SurgeryError
        When the detector has too few priors or classes for that.
    """
    priors, classes = tail.heads.num_priors, len(_foreground(tail))
    if priors < RUN or not classes:
        raise SurgeryError(
            f"{priors} priors and {classes} classes beside the background are too few to prove a "
            "surgery"
        )
    rng = np.random.default_rng(0)
    keep = tail.attributes.keepTopK
    count = 2 * _runs(tail, keep)
    scores = _scores(tail, SPARSE_IMAGES * count, rng)
    images = [_background(tail, rng)]
    images += [_with_runs(tail, part, rng) for part in np.split(scores, SPARSE_IMAGES)]
    images.append(_with_runs(tail, _scores(tail, 2 * _runs(tail, 8 * keep), rng), rng))
    if not tail.capped_after_suppression:
        images.append(_crowd(tail, rng))
    return images + (_cut_images(tail, rng) if tail.attributes.levelTopK else [])


def _foreground(tail: DetectionTail) -> list[int]:
    classes = range(tail.heads.num_classes)
    return [label for label in classes if label != tail.attributes.backgroundLabelId]


def _runs(tail: DetectionTail, detections: int) -> int:
    """How many runs, of two classes each, fit below a number of detections and below topK."""
    by_class = len(_foreground(tail)) * (tail.attributes.topK // (2 * RUN))
    return max(1, min(tail.heads.num_priors // RUN, by_class, detections // (2 * RUN)))


def _scores(tail: DetectionTail, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Spread half of the scores over 0 to 1, half around the threshold; in random order."""
    threshold = tail.attributes.confidenceThreshold
    everywhere = (np.arange(count // 2) + 0.5) / (count // 2)
    steps = min(threshold, 1 - threshold) * np.logspace(-4, -0.05, count - len(everywhere))
    steps[::2] *= -1
    return rng.permutation(np.concatenate([everywhere, threshold + steps]).clip(1e-4, 1 - 1e-4))


def _background(tail: DetectionTail, rng: np.random.Generator) -> Image:
    """Boxes of all sizes, and logits that say background everywhere, if there is one."""
    classes, count = tail.heads.num_classes, tail.heads.num_priors
    spread = np.repeat(rng.choice([SMALL, LARGE], count // RUN + 1), RUN)[:count]
    loc = rng.normal(size=(4, count)) * spread / tail.priors[1].reshape(-1, 4).T
    conf = rng.normal(0.0, 0.1, (classes, count)).astype(np.float32)
    if tail.attributes.confSigmoid:
        conf -= 8.0
    elif tail.attributes.backgroundLabelId >= 0:
        conf[tail.attributes.backgroundLabelId] += 8.0
    return loc.astype(np.float32), conf


def _with_runs(tail: DetectionTail, scores: NDArray[np.float64], rng: np.random.Generator) -> Image:
    """Place a run for every two scores."""
    loc, conf = _background(tail, rng)
    labels, order = _foreground(tail), tail.heads.order
    starts = RUN * rng.choice(tail.heads.num_priors // RUN, len(scores) // 2, replace=False)
    for index, (start, pair) in enumerate(zip(starts, scores.reshape(-1, 2), strict=True)):
        label, second = (labels[(index + i) % len(labels)] for i in (0, 1))
        for prior, score in zip((start, start + 2), pair, strict=True):
            rest = (1 - score) * SECOND_SHARE
            wanted = {second: rest, label: score} if len(conf) > 2 else {label: score}
            _set_scores(tail, conf[:, prior], wanted)
        if order[start] < order[start + 1]:
            conf[:, start + 1] = conf[:, start]
    return loc, conf


def _crowd(tail: DetectionTail, rng: np.random.Generator) -> Image:
    """Place more than topK candidates in one class, or, for levels, in all together.

    Where there are so many priors.
    """
    loc, conf = _background(tail, rng)
    labels = _foreground(tail)[: None if tail.attributes.levelTopK else 1]
    count = min(tail.heads.num_priors, tail.attributes.topK + 50)
    where = rng.choice(tail.heads.num_priors, count, replace=False)
    threshold = tail.attributes.confidenceThreshold
    for index, group in enumerate(map(np.sort, np.split(where, range(TIED, count, TIED)))):
        label = labels[index % len(labels)]
        place = tail.heads.order[group]
        tied = group[place == np.maximum.accumulate(place)]
        for prior in (tied[0], *np.setdiff1d(group, tied)):
            _set_scores(tail, conf[:, prior], {label: rng.uniform(threshold, 1)})
        conf[:, tied] = conf[:, tied[:1]]
    return loc, conf


def _cut_images(tail: DetectionTail, rng: np.random.Generator) -> list[Image]:
    """Make images on which another cut gives other rows: of each level alone, and of all at once.

    A level that is cut has levelTopK - k high scores on one box, and 2 k low ones apart: of the
    high ones a row of each class comes out, of the low ones k. Another level has high scores alone,
    on the same box, as many as may come in: with them a cut over all levels drops low scores.

    A level is such another one, too, where its high scores need more classes than keepTopK has room
    for, since what is within its cut then fills the rows, and where it is cut by so few that they
    do not fit beside the low ones.
    """
    heads, most, keep = tail.heads, tail.attributes.levelTopK, tail.attributes.keepTopK
    labels, levels = np.array(_foreground(tail)), heads.levels
    least = max(1, min(BEHIND, most, keep // (4 * len(levels))))
    room = min(len(labels), keep - least * len(levels))
    if room < 1:
        return []
    boxes = np.zeros(heads.num_priors, np.intp)  # of each prior: the first, but of low scores
    highs: list[NDArray[np.intp]] = []  # of each level [2, n]: class and prior
    lows: list[NDArray[np.intp]] = []
    start = 0
    for level in levels:
        priors = start + rng.permutation(level.priors)
        start += level.priors
        behind = max(0, min(least, len(labels) * level.priors - most))
        apart = -(-2 * behind // len(labels))
        near, count = priors[apart:], most - behind
        if not behind or len(near) * room < count:
            behind, near, count = 0, priors, min(most, len(priors) * room)
        # More classes than it takes, for suppression in each to be small.
        classes = max(min(room, len(levels)), -(-count // max(1, len(near))))
        places = np.arange(count)
        highs.append(np.stack([places % classes, near[places // classes]]))
        places = np.arange(2 * behind)
        lows.append(np.stack([places // max(1, apart), priors[places % max(1, apart)]]))
        if behind:
            boxes[priors[:apart]] = boxes.max() + 1 + np.arange(apart)
    loc = _on_boxes(tail, boxes)
    alone = [[index] for index, low in enumerate(lows) if low.size]
    every = [[*range(len(levels))]] if len(levels) > 1 else []
    images = []
    for chosen in alone + every:
        _, conf = _background(tail, rng)
        for parts, best, worst in ((highs, 0.9, 0.5), (lows, 0.4, 0.1)):
            label, prior = np.concatenate([parts[index] for index in chosen], axis=1)
            above = rng.permutation(np.linspace(best, worst, len(prior)))
            threshold = tail.attributes.confidenceThreshold
            score = threshold + (1 - threshold) * above
            conf[labels[label], prior] = np.log(score / (1 - score))
        images.append((loc, conf))
    return images


def _on_boxes(tail: DetectionTail, boxes: NDArray[np.intp]) -> Floats:
    """Deltas [4, P] that put each prior on one of some boxes that do not touch.

    None is larger than the smallest prior, so that no bound of dw and dh is reached.
    """
    priors, variances = tail.priors.astype(np.float64).reshape(2, -1, 4)
    sizes = priors[:, 2:] - priors[:, :2]
    side = int(np.ceil(np.sqrt(boxes.max() + 1)))
    centres = (np.stack([boxes % side, boxes // side], axis=1) + 0.5) / side
    shift = (centres - (priors[:, :2] + priors[:, 2:]) / 2) / sizes
    stretch = np.log(np.minimum(0.5 / side, sizes.min(axis=0)) / sizes)
    loc = np.concatenate([shift, stretch], axis=1) / variances
    return np.ascontiguousarray(loc.T, np.float32)


def _set_scores(tail: DetectionTail, logits: Floats, scores: dict[int, float]) -> None:
    """Change the logits [C] of one prior so that some classes get these scores."""
    if tail.attributes.confSigmoid:
        for label, score in scores.items():
            logits[label] = np.log(score / (1 - score))
        return
    rest = np.exp(np.delete(logits, list(scores)).astype(np.float64)).sum()
    rest /= 1 - sum(scores.values())
    for label, score in scores.items():
        logits[label] = np.log(score * rest)

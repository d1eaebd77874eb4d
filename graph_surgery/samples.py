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

TIED = 7
"""Candidates of equal score in a crowd; a topK of 200 ends within such a group."""


def proof_images(tail: DetectionTail) -> list[Image]:
    """Make seeded images for a tail.

    One without candidates; some with so few that each which survives is a detection; one with
    more than keepTopK detections; and, unless the tail caps its classes after suppression, one
    with a class of more than topK candidates. The others keep every class below topK.

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
    return images


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

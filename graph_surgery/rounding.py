"""Which differences of two lists of detections hang on rounding, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

TOLERANCE = 1e-5
"""Largest difference of a score or a normalised coordinate. What decides over a detection, a score
or an IoU, may fall on either side of a border that is no farther away."""

CORNER = 2.0**-23
"""Rounding of a corner near 1 in float32, by the few operations that decode it."""

_OUT, _PERHAPS, _IN = range(3)


@dataclass(frozen=True)
class Rules:
    """What makes detections of boxes and scores.

    Attributes
    ----------
    threshold, overlap
        A candidate's score is larger; a suppressed box's IoU is larger.
    top_k, keep
        Candidates of a class, detections of an image.
    level_top_k
        Candidates of a level, of all its classes together, in place of `top_k`; 0: no such cut.
    clip
        Whether boxes are clipped to the image before suppression.
    corner
        Rounding of a corner in what is suppressed, relative where corners are beyond 1.
    """

    threshold: float
    overlap: float
    top_k: int
    keep: int
    level_top_k: int = 0
    clip: bool = False
    corner: float = CORNER


@dataclass(frozen=True)
class Undecided:
    """What a correct result of an image may have or lack.

    Attributes
    ----------
    rows
        [n, 6]: ymin, xmin, ymax, xmax, clipped to the image, score, label.
    least, most
        Detections of a correct result.
    """

    rows: Floats
    least: int
    most: int


NOTHING = Undecided(np.empty((0, 6), np.float32), 0, 0)


@dataclass(frozen=True)
class Comparison:
    """Two lists of detections of an image.

    Attributes
    ----------
    differences
        [n, 6]: absolute, of the rows that have their equal.
    lacking, excess
        [n, 6]: the second list's rows that the first lacks, and the first's that the second
        lacks, although no rounding decides over them.
    disordered
        [n, 6]: rows of the first list that stand behind one of smaller score, or before one that
        the second has before it and that rounding did not swap with it.
    """

    differences: Floats
    lacking: Floats
    excess: Floats
    disordered: Floats

    @property
    def faults(self) -> int:
        """Rows that are wrong."""
        return len(self.lacking) + len(self.excess) + len(self.disordered)


def compare(first: Floats, second: Floats, doubtful: Callable[[], Undecided]) -> Comparison:
    """Compare two lists of detections, rows [n, 6] of box, score, label.

    Rows whose scores differ by more than nothing, on either side, and by no more than `TOLERANCE`
    on both may be swapped: scores that are equal on both sides have one order.

    Parameters
    ----------
    doubtful
        Gives what is `undecided`; called where one list has a row that the other lacks.
    """
    partner = _match(first, second)
    paired = np.flatnonzero(partner >= 0)
    excess = first[partner < 0]
    lacking = second[np.setdiff1d(np.arange(len(second)), partner)]
    if len(excess) or len(lacking):
        known = doubtful()
        if all(known.least <= len(rows) <= known.most for rows in (first, second)):
            excess, lacking = (lone[_match(lone, known.rows) < 0] for lone in (excess, lacking))
    theirs = partner[paired]
    gaps = [np.abs(s[:, None] - s) for s in (first[paired, 4], second[theirs, 4])]
    one_order = (np.maximum(*gaps) > TOLERANCE) | (np.maximum(*gaps) == 0)
    alone = _alone(first)[paired] & _alone(second)[theirs]  # the others' equal might be another
    one_order &= alone[:, None] & alone
    swapped = np.triu(one_order & (theirs[:, None] > theirs)).any(axis=1)
    rising = np.flatnonzero(np.diff(first[:, 4]) > 0) + 1
    disordered = first[np.union1d(paired[swapped], rising)]
    return Comparison(np.abs(first[paired] - second[theirs]), lacking, excess, disordered)


def _alone(rows: Floats) -> Bools:
    """Whether each row differs from all others of the list by more than rounding."""
    distances = np.abs(rows[:, None] - rows).max(axis=2)
    return np.asarray((distances <= TOLERANCE).sum(axis=1) == 1)


def _match(rows: Floats, others: Floats) -> Ints:
    """For each row the index of an equal of its own: label, score and box agree; -1 without one."""
    result = np.full(len(rows), -1)
    free = np.ones(len(others), bool)
    for i, row in enumerate(rows):
        distance = np.abs(others - row).max(axis=1, initial=0.0)
        fits = free & (distance <= TOLERANCE)
        if fits.any():
            result[i] = np.where(fits, distance, np.inf).argmin()
            free[result[i]] = False
    return result


def undecided(
    boxes: Floats, scores: Floats, same: Ints, rules: Rules, levels: Sequence[int] = ()
) -> Undecided:
    """Find the detections of an image that a correct result may have or lack.

    Borderline decisions are followed through the candidates of each class, suppression and the
    choice of the image's best.

    Parameters
    ----------
    boxes
        [P, 4]: ltrb in fractions of the image, not clipped.
    scores
        [C, P]; not positive where a class cannot be detected.
    same
        [C, P]: one number for scores that are equal whoever computes them. Of those, the one of
        the lower class, then prior, comes first.
    levels
        Priors of each level, for a cut of levels.
    """
    boxes = boxes.clip(0, 1) if rules.clip else boxes
    labels, priors, firsts = _entering(scores, same, rules, levels)
    parts: list[tuple[Any, ...]] = []
    for label in range(len(scores)):
        prior, first = priors[labels == label], firsts[labels == label]
        order = np.lexsort((prior, -scores[label, prior]))
        prior, first = prior[order], first[order]
        score, ties = scores[label, prior], same[label, prior]
        fate = _suppress(boxes[prior], score, ties, first, rules)
        kept = fate != _OUT
        parts.append((score[kept], np.full(kept.sum(), label), prior[kept], ties[kept], fate[kept]))
    columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
    order = np.lexsort((columns[2], columns[1], -columns[0]))
    all_scores, all_labels, priors, all_same, fates = (column[order] for column in columns)
    at_least, at_most = _ranks(all_scores, all_same, fates == _IN)
    found = (at_least < rules.keep) & ((fates != _IN) | (at_most >= rules.keep))
    corners = boxes[priors[found]].clip(0, 1)[:, [1, 0, 3, 2]]
    rows = np.column_stack([corners, all_scores[found], all_labels[found]])
    return Undecided(rows, min(rules.keep, (fates == _IN).sum()), min(rules.keep, len(fates)))


def _entering(
    scores: Floats, same: Ints, rules: Rules, levels: Sequence[int]
) -> tuple[Ints, Ints, Bools]:
    """Label and prior of the candidates that may enter suppression, and who does without doubt."""
    label, prior = np.nonzero(scores > max(rules.threshold - TOLERANCE, 0.0))
    score, ties = scores[label, prior], same[label, prior]
    group = np.searchsorted(np.cumsum(levels), prior, "right") if rules.level_top_k else label
    cap = rules.level_top_k or rules.top_k
    entering: list[Ints] = [np.empty(0, int)]
    firsts: list[Bools] = [np.empty(0, bool)]
    for number in np.unique(group):
        (members,) = np.nonzero(group == number)
        members = members[np.lexsort((prior[members], label[members], -score[members]))]
        sure = score[members] > rules.threshold + TOLERANCE
        at_least, at_most = _ranks(score[members], ties[members], sure)
        enters = at_least < cap
        entering.append(members[enters])
        firsts.append((sure & (at_most < cap))[enters])
    chosen = np.concatenate(entering)
    return label[chosen], prior[chosen], np.concatenate(firsts)


def _ranks(score: Floats, same: Ints, sure: Bools) -> tuple[Ints, Ints]:
    """How many candidates come before each, in any correct order: at least, at most.

    They are given in the order of the rules; `sure` says which count without doubt.
    """
    ascending, ascending_sure = np.sort(score), np.sort(score[sure])
    by_group = np.argsort(same, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(same[by_group]) != 0])[: len(same)]
    sizes = np.diff(np.r_[starts, len(same)])
    before, behind = np.empty(len(same), int), np.empty(len(same), int)  # in the own group
    counted: Ints = np.cumsum(sure[by_group]) - sure[by_group]
    before[by_group] = counted - np.repeat(counted[starts], sizes)
    behind[by_group] = np.repeat(starts + sizes, sizes) - 1 - np.arange(len(same))
    above = len(ascending_sure) - np.searchsorted(ascending_sure, score + TOLERANCE, "right")
    not_below = len(score) - np.searchsorted(ascending, score - TOLERANCE, "left")
    return above + before, not_below - 1 - behind


def _suppress(
    boxes: Floats, score: Floats, same: Ints, first: Bools, rules: Rules
) -> NDArray[np.int_]:
    """Fate of the candidates of a class, in order; `first`: who enters without doubt."""
    surely, perhaps = _overlaps(boxes, rules.overlap, rules.corner)
    fate = np.full(len(boxes), _PERHAPS)
    for i in range(len(boxes)):
        others = np.flatnonzero(perhaps[i] & (fate != _OUT))
        tied = same[others] == same[i]
        gap = score[others] - score[i]
        before = np.where(tied, others < i, gap > TOLERANCE)
        behind = np.where(tied, others > i, gap < -TOLERANCE)
        if (before & surely[i, others] & (fate[others] == _IN)).any():
            fate[i] = _OUT
        elif first[i] and behind.all():
            fate[i] = _IN
    return fate


def _overlaps(boxes: Floats, threshold: float, corner: float) -> tuple[Bools, Bools]:
    """Whether the IoU of each two boxes [n, 4] is above a threshold: surely, perhaps."""
    lt, rb = np.split(boxes.astype(np.float64), 2, axis=1)
    size = (rb - lt).clip(min=0)
    rounding = corner * np.abs(boxes).max(axis=1, initial=1.0)
    shared = np.minimum(rb[:, None], rb) - np.maximum(lt[:, None], lt)
    common, area = shared.clip(min=0).prod(axis=-1), size.prod(axis=1)
    union = area[:, None] + area - common
    with np.errstate(divide="ignore", invalid="ignore"):
        overlap = np.where(union > 0, common / union, 0.0)
        moves = np.where(area > 0, 4 * rounding / size.min(axis=1), 0.0)  # what a corner can change
    tolerance = TOLERANCE + moves[:, None] + moves
    near = (shared >= -rounding[:, None, None] - rounding[:, None]).all(axis=-1)
    perhaps = near & (overlap > threshold - tolerance)
    np.fill_diagonal(perhaps, False)
    return overlap > threshold + tolerance, perhaps

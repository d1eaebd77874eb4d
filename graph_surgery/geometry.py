"""Anchors, variances, bound and clip of a tail that cuts its levels, by experiment.

Boxes are seen where suppression sees them, which may be behind a clip to the image: so anchors are
looked at shrunk, and moved into the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graph_surgery.candidates import Candidates, layouts, places, sample
from graph_surgery.errors import SurgeryError
from graph_surgery.heads import Heads
from graph_surgery.probe import BOX_FORMS, FRACTIONS, TOLERANCE, Run, decode, extent_of, spans

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.intp]

_TINY = 256.0
"""A negative delta that makes a box a point, of any variance from 0.1 on."""

_FIRST, _SECOND = 4.0, 3.0
"""Negative deltas of width and height that tell their variance."""

_MOVE = 1 / 16
"""A delta of a centre that tells its variance."""

_LARGE = 20.0
"""A stretch beyond any bound in use: exp(20) is 5e8."""

_FAR = 1e4
"""A shift, in sizes of an anchor, out of any image."""

_SIDE = 0.3
"""Side, in images, that an anchor is shrunk to where it is larger."""

KNOWN_BOUND = math.log(1000 / 16)
"""``bbox_xform_clip`` of Detectron and torchvision; what is measured near it is taken for it."""


class _UnlikeError(Exception):
    """A reading under which boxes are not what they must be, and how near it came."""

    def __init__(self, what: str, step: int, likeness: float = 0.0) -> None:
        super().__init__(what)
        self.nearness = step, likeness


@dataclass(frozen=True)
class Geometry:
    """How the graph makes boxes.

    Attributes
    ----------
    candidates
        With the order of channels.
    unit
        Width and height of the image in its boxes.
    priors
        [P, 4]: ltrb in fractions of the image, in the operator's order.
    variances
        [4].
    bound
        Of dw and dh times their variances; 0: none.
    clips
        Whether boxes are clipped before suppression.
    """

    candidates: Candidates
    unit: tuple[float, float]
    priors: Floats
    variances: Floats
    bound: float
    clips: bool

    def boxes(self, chosen: Ints, deltas: Floats) -> Floats:
        """Boxes [n, 4] in fractions of the image that suppression should see."""
        made = decode(self.priors[chosen], self.variances, deltas, self.bound)
        return np.asarray(made.clip(0, 1) if self.clips else made)


def read_geometry(run: Run, heads: Heads, image: tuple[int, int] | None, most: int) -> Geometry:
    """Find the candidates' boxes, and read from them how they are made.

    Parameters
    ----------
    image
        Width and height in pixels, where they are known.
    most
        Candidates of a level that come in.

    Raises
    ------
    SurgeryError
        When no tensor holds boxes decoded as CENTER_SIZE.
    """
    errors: list[tuple[int, float, str]] = []
    for place in places(run, heads):
        for form in BOX_FORMS:
            for ordered in layouts(heads):
                candidates = replace(place, heads=ordered, form=form)
                try:
                    return _read(candidates, image, most)
                except _UnlikeError as error:
                    what = f"{place.boxes!r} read as {form}, {ordered.layout}: {error}"
                    errors.append((*error.nearness, what))
    raise SurgeryError(
        "no tensor before suppression holds candidates' boxes decoded as CENTER_SIZE; nearest is "
        f"{max(errors)[2]}; export with boxes coded so"
    )


def _read(candidates: Candidates, image: tuple[int, int] | None, most: int) -> Geometry:
    heads, rng = candidates.heads, np.random.default_rng(0)
    chosen = sample(heads, min(8, most - max(level.anchors for level in heads.levels)), rng)
    fine = chosen < heads.levels[0].priors  # whose anchors are small

    def seen(dx: float | Floats, dy: float | Floats, dw: float, dh: float) -> Floats:
        deltas = np.empty((len(chosen), 4))
        for column, values in enumerate((dx, dy, dw, dh)):
            deltas[:, column] = values
        return candidates(chosen, deltas)

    points = seen(0, 0, -_TINY, -_TINY)
    centre = (points[:, :2] + points[:, 2:]) / 2
    if (np.abs(points[:, 2:] - points[:, :2]) > 1e-3 * np.abs(centre).max()).any():
        raise _UnlikeError("its boxes do not shrink with dw and dh", 0)
    first, second = (seen(0, 0, -one, -one) for one in (_FIRST, _SECOND))
    sizes = [(one[:, 2:] - one[:, :2]) for one in (first, second)]
    with np.errstate(all="ignore"):
        ratio = np.log(sizes[1] / sizes[0])[fine] / (_FIRST - _SECOND)
    stretch = _rounded(np.median(ratio, axis=0))
    if not (stretch > 0).all():
        raise _UnlikeError("its boxes do not grow with dw and dh", 1)
    size = sizes[0] * np.exp(_FIRST * stretch)
    inward = np.where(centre < np.median(centre, axis=0), _MOVE, -_MOVE)
    moved = seen(inward[:, 0], inward[:, 1], -_TINY, -_TINY)
    with np.errstate(all="ignore"):
        move = (((moved[:, :2] + moved[:, 2:]) / 2 - centre) / (inward * size))[fine]
    variances = np.concatenate([_rounded(np.median(move, axis=0)), stretch])
    if not (variances > 0).all():
        raise _UnlikeError("its boxes do not move with dx and dy", 2)

    far = _FAR / variances[:2]
    before, behind = (seen(x, y, -_TINY, -_TINY) for x, y in (-far, far))
    unit, clips = _unit(before, behind)
    anchors = _anchors(candidates, variances, _sizes(heads, chosen, size), unit, most)
    if unit is None:
        whole = extent_of(anchors)
        unit = next((one for one in (FRACTIONS, image) if one and spans(whole, one)), None)
        if unit is None:
            what = f"its priors span {whole[0]:.4g} x {whole[1]:.4g}, not an image"
            raise _UnlikeError(what, 3)
    priors = anchors / np.tile(unit, 2)
    bound = _bound(candidates, chosen[fine][0], anchors, variances, unit)
    geometry = Geometry(candidates, unit, priors, variances, bound, clips)
    _check(geometry, most)
    return geometry


def _rounded(values: Floats) -> Floats:
    """To four digits: variances are such numbers, and are confirmed by all else."""
    values = np.where(np.isfinite(values), values, 0.0)
    return np.array([float(f"{value:.4g}") for value in values])


def _unit(before: Floats, behind: Floats) -> tuple[tuple[float, float] | None, bool]:
    """The image's size, where points far out of it are clipped to its corners; whether they are."""
    if (before == 0).all() and (behind == behind[0]).all() and (behind[0] > 0).all():
        return (float(behind[0, 0]), float(behind[0, 1])), True
    return None, False


def _sizes(heads: Heads, chosen: Ints, size: Floats) -> Floats:
    """Sizes [P, 2] of all anchors, roughly: that of each anchor of a level in its middle cell."""
    every, start = [], 0
    for level in heads.levels:
        cells = level.height * level.width
        middle = (level.height // 2) * level.width + level.width // 2
        for anchor in range(level.anchors):
            (place,) = np.flatnonzero(chosen == start + anchor * cells + middle)
            every.append(np.broadcast_to(size[place], (cells, 2)))
        start += level.priors
    return np.concatenate(every)


def _anchors(
    candidates: Candidates,
    variances: Floats,
    size: Floats,
    unit: tuple[float, float] | None,
    most: int,
) -> Floats:
    """All anchors [P, 4], ltrb in the graph's unit, each shrunk and moved into the image."""
    heads = candidates.heads
    limit = np.asarray(unit or np.full(2, np.inf)) * _SIDE
    shown = np.minimum(size, limit)
    dwh = np.minimum(np.log(shown / size), 0.0) / variances[2:]
    parts, start = [], 0
    for level in heads.levels:
        place = np.arange(level.priors) % (level.height * level.width)
        x, y = place % level.width, place // level.width
        inward = np.stack([x < level.width / 2, y < level.height / 2], axis=1) * 2 - 1
        own = slice(start, start + level.priors)
        reach = shown[own] * 0.55 / size[own] / variances[:2]
        parts.append(inward * (reach if unit else 0.0))
        start += level.priors
    deltas = np.concatenate([np.concatenate(parts), dwh], axis=1).astype(np.float32)
    ends = np.cumsum([level.priors for level in heads.levels])
    starts = np.r_[0, ends[:-1]]
    seen = np.empty((heads.num_priors, 4))
    for begin in range(0, max(level.priors for level in heads.levels), most):
        chosen = np.concatenate(
            [
                np.arange(min(first + begin, end), min(first + begin + most, end))
                for first, end in zip(starts, ends, strict=True)
            ]
        )
        seen[chosen] = candidates(chosen, deltas[chosen])
    extent = (seen[:, 2:] - seen[:, :2]) / np.exp(deltas[:, 2:].astype(np.float64) * variances[2:])
    centre = (seen[:, :2] + seen[:, 2:]) / 2 - deltas[:, :2] * variances[:2] * extent
    return np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)


def _bound(
    candidates: Candidates,
    prior: int,
    anchors: Floats,
    variances: Floats,
    unit: tuple[float, float],
) -> float:
    """Bound of the stretch of one anchor's width and height, by where its far corner is.

    The centre is moved back by ever more of the anchor's size until the corner leaves the image.
    """
    anchor = anchors[prior]
    size, centre = anchor[2:] - anchor[:2], (anchor[:2] + anchor[2:]) / 2
    least, most = np.zeros(2), np.full(2, math.exp(_LARGE) / 2)
    found = np.full(2, np.nan)
    for turn in range(40):
        middle = np.sqrt(np.maximum(least, 0.25) * most) if turn < 20 else (least + most) / 2
        deltas = np.concatenate([-middle / variances[:2], _LARGE / variances[2:]])
        corner = candidates(np.array([prior]), deltas[None].astype(np.float32))[0, 2:]
        middle = -deltas[:2].astype(np.float32).astype(np.float64) * variances[:2]
        inside = (corner > 0) & (corner < unit)
        reach = (corner - centre) / size + middle
        found = np.where(inside, reach, found)
        if inside.all():
            break
        least = np.where(corner >= unit, middle, least)
        most = np.where(corner <= 0, middle, most)
    reach = np.where(np.isfinite(found), found, (least + most) / 2)
    bounds = np.log(2 * reach)
    if (bounds > _LARGE - 1e-3).all():
        return 0.0
    if abs(bounds[0] - bounds[1]) > TOLERANCE:
        what = f"its dw and dh are bounded by {bounds[0]:.6g} and {bounds[1]:.6g}"
        raise _UnlikeError(what, 4)
    if abs(bounds[0] - KNOWN_BOUND) < TOLERANCE:
        return KNOWN_BOUND
    return float(f"{bounds[0]:.6g}")


def _check(geometry: Geometry, most: int) -> None:
    """Hold boxes of random priors, at random deltas, against what was read."""
    candidates, rng = geometry.candidates, np.random.default_rng(1)
    heads = candidates.heads
    chosen = sample(heads, min(100, most - max(level.anchors for level in heads.levels)), rng)
    deltas = rng.uniform(-1, 1, (len(chosen), 4)) * rng.choice([0.5, 5.0], (len(chosen), 1))
    deltas = (deltas / geometry.variances).astype(np.float16).astype(np.float64)
    made = candidates(chosen, deltas) / np.tile(geometry.unit, 2)
    expected = geometry.boxes(chosen, deltas)
    difference = float((np.abs(made - expected) / np.maximum(1, np.abs(expected))).max())
    if not difference <= TOLERANCE:
        raise _UnlikeError(f"its boxes differ by {difference:.2g}", 5, -difference)

"""Learning by experiment what the tensors behind the heads mean.

The part of the graph from the head tensors to its NonMaxSuppression runs on chosen deltas and
logits; a tensor holds the decoded boxes, or the scores, when its values say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.heads import OPERATOR, Heads, Layout
from graph_surgery.protobuf import Arrays

Floats = NDArray[np.floating[Any]]
Run = Callable[[NDArray[np.float32], NDArray[np.float32]], Arrays]

TOLERANCE = 1e-5
"""Largest difference, absolute or relative, that counts as rounding of float32."""

BOX_FORMS = {
    "ltrb": np.eye(4),
    "yxyx": np.eye(4)[:, [1, 0, 3, 2]],
    "centre and size": np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]]),
}
"""Columns of a decoded box, times this, are xmin, ymin, xmax, ymax."""


FRACTIONS = (1, 1)
"""Width and height of the image where boxes are fractions of it."""


@dataclass(frozen=True)
class Decoded:
    """Decoded boxes behind the heads of a graph.

    Attributes
    ----------
    name, form
        A tensor, and how it writes a box, of `BOX_FORMS`. All boxes, and nothing has clipped them;
        of a tail that cuts its levels, the candidates as suppression sees them.
    unit
        Width and height of the image there.
    layout
        The order of channels and priors.
    """

    name: str
    form: str
    unit: tuple[int, int]
    layout: Layout

    def corners(self, values: NDArray[Any], order: NDArray[np.intp]) -> Floats:
        """Boxes as ltrb [N, P, 4] in fractions of the image.

        Parameters
        ----------
        values
            The tensor, [N, P, 4] or [N, 4, P].
        order
            [P]: which of its boxes comes first, second, ...
        """
        rows = values if values.shape[1:] == (len(order), 4) else values.swapaxes(1, 2)
        with np.errstate(invalid="ignore"):  # what is no box may be infinite
            corners = rows[:, order].astype(np.float64) @ BOX_FORMS[self.form]
        return np.asarray(corners / np.tile(self.unit, 2))


OPERATOR_BOXES = Decoded("ltrb", "ltrb", FRACTIONS, OPERATOR)
"""Those of NMS_OPT_TRT, a tensor within its definition."""


def decode(priors: Floats, variances: Floats, deltas: Floats, bound: float = 0.0) -> Floats:
    """CENTER_SIZE (SSD, Liu et al. 2016): priors ltrb [P, 4], deltas [P, 4] to ltrb [P, 4].

    `variances` are [4] or [P, 4]; `bound` is that of dw and dh times theirs, 0 for none.
    """
    size = priors[:, 2:] - priors[:, :2]
    with np.errstate(all="ignore"):  # what is no box may overflow
        centre = (priors[:, :2] + priors[:, 2:]) / 2 + deltas[:, :2] * variances[..., :2] * size
        stretch = np.minimum(deltas[:, 2:] * variances[..., 2:], bound or np.inf)
        half = np.exp(stretch) * size / 2
    return np.concatenate([centre - half, centre + half], axis=1)


_SHIFT = np.array([[100.0], [100.0], [0.0], [0.0]])
_STRETCH = np.array([[0.0], [0.0], [10.0], [10.0]])
"""Deltas that bring out a variance well above the rounding of a coordinate."""

_WIDE = 50.0
"""Deltas up to here, either way: a stretch to exp(10) for a variance of 0.2."""

_BOOST = 8.0
"""Added to one logit of each prior: its score is then near 1, for up to a few hundred classes."""


def probe_boxes(
    run: Run, heads: Heads, image: tuple[int, int] | None
) -> tuple[NDArray[np.float32], Decoded]:
    """Find the decoded boxes, before anything clips them, and read priors and variances from them.

    Parameters
    ----------
    run
        Takes channels in the graph's order.
    image
        Its width and height in pixels, where they are known.

    Returns
    -------
    priors
        float32 [2, P * 4, 1]: ltrb of the priors in fractions of the image, and their variances,
        in the operator's order.
    decoded
        Where the boxes were found.

    Raises
    ------
    SurgeryError
        When no tensor holds boxes decoded as CENTER_SIZE from priors on a grid over the image.
    """
    rng = np.random.default_rng(0)
    count = heads.num_priors
    noise = _representable(rng.uniform(-1, 1, (4, count)) * rng.choice([1.0, _WIDE], count))
    tried = []
    for flags in itertools.product((False, True), repeat=3):
        ordered = replace(heads, layout=Layout(*flags))
        for name, form, still, variances, moved in _moving(run, ordered, noise):
            extent = extent_of(still)
            unit = next((u for u in (FRACTIONS, image) if u and spans(extent, u)), None)
            zero, random = (rows / np.tile(unit or FRACTIONS, 2) for rows in (still, moved))
            expected = decode(zero, variances, noise.T)
            difference = float(np.max(np.abs(random - expected) / np.maximum(1, np.abs(expected))))
            lacks = []
            if not _lies_on_grid(zero, heads):
                lacks.append("its priors do not lie on the grids of the heads")
            if unit is None:
                pixels = f", nor {image[0]} x {image[1]} pixels" if image else ""
                lacks.append(
                    f"its priors span {extent[0]:.4g} x {extent[1]:.4g}, not 1 x 1{pixels}"
                )
            if not difference <= TOLERANCE:
                lacks.append(f"its boxes differ by {difference:.2g}")
            if unit and not lacks:
                planes = [zero.reshape(-1), np.tile(variances, count)]
                priors = np.stack(planes)[:, :, None].astype(np.float32)
                return priors, Decoded(name, form, unit, ordered.layout)
            found = f"{name!r} read as {form}, {ordered.layout}: {'; '.join(lacks)}"
            tried.append((len(lacks), difference, found))
    if not tried:
        raise SurgeryError(
            f"no decoded boxes: no tensor behind the heads, [N, {count}, 4] or [N, 4, {count}], "
            "moves with dx, dy and grows with exp(dw), exp(dh): export with boxes coded so"
        )
    raise SurgeryError(
        "no tensor behind the heads holds boxes decoded as CENTER_SIZE from priors on a grid; "
        f"nearest is {min(tried)[2]}; export with priors in the order of the heads' cells, and "
        "without what else is done to deltas or boxes, such as a bound of dw and dh"
    )


def extent_of(priors: Floats) -> Floats:
    """Width and height of the image, from centres that lie as far from one border as the other."""
    centre = (priors[:, :2] + priors[:, 2:]) / 2
    return np.asarray(centre.min(axis=0) + centre.max(axis=0))


def spans(extent: Floats, unit: tuple[int, int]) -> bool:
    """Whether priors span an image of this size, roughly: grids may end before or behind it."""
    return bool((extent > np.divide(unit, 2)).all() and (extent < np.multiply(unit, 2)).all())


def _moving(
    run: Run, heads: Heads, noise: Floats
) -> Iterator[tuple[str, str, Floats, Floats, Floats]]:
    """Tensors that follow the deltas as boxes do, the last one first.

    Name, form, corners at no deltas, variances, corners at the noise.
    """
    batch, count = heads.batch or 1, heads.num_priors
    logits = np.zeros((batch, heads.num_classes, count), np.float32)
    probes = [
        run(*heads.arrange(np.broadcast_to(deltas, (batch, 4, count)).astype(np.float32), logits))
        for deltas in (np.zeros((4, 1)), _SHIFT, _STRETCH, noise)
    ]
    for name in reversed(probes[0]):
        found = [rows for p in probes if (rows := _rows(p[name], heads.order, 4)) is not None]
        if not found:
            continue
        for form, corners in BOX_FORMS.items():
            with np.errstate(invalid="ignore"):  # what is no box may be infinite
                zero, shifted, stretched, random = (rows @ corners for rows in found)
            variances = _variances(zero, shifted, stretched)
            if variances.min() > 0:  # else it does not follow the deltas, as the scores do not
                yield name, form, zero, variances, random


def _representable(values: Floats) -> Floats:
    """Round to float16, so that heads of that type hold the same values."""
    return values.astype(np.float16).astype(np.float64)


def _rows(values: NDArray[Any], order: NDArray[np.intp], width: int) -> Floats | None:
    """First image of [N, P, width] or [N, width, P] as float64 [P, width] in an order, or None."""
    if values.dtype.kind != "f" or values.ndim != 3:
        return None
    rows = values[0] if values.shape[1:] == (len(order), width) else values[0].T
    return rows[order].astype(np.float64) if rows.shape == (len(order), width) else None


def _variances(zero: Floats, shifted: Floats, stretched: Floats) -> Floats:
    """Four variances from boxes at no deltas, at `_SHIFT` and at `_STRETCH`, to six digits."""
    size = zero[:, 2:] - zero[:, :2]
    with np.errstate(all="ignore"):
        shift = (shifted - zero)[:, :2] / size / _SHIFT[:2].T
        stretch = np.log((stretched[:, 2:] - stretched[:, :2]) / size) / _STRETCH[2:].T
    medians = np.median(np.concatenate([shift, stretch], axis=1), axis=0)
    medians[~np.isfinite(medians)] = 0.0
    return np.array([float(f"{value:.6g}") for value in medians])


def _lies_on_grid(priors: Floats, heads: Heads) -> bool:
    """Whether centres vary in x along the columns only, and in y along the rows only."""
    start = 0
    for level in heads.levels:
        block = priors[start : start + level.priors]
        start += level.priors
        centre = (block[:, :2] + block[:, 2:]).reshape(level.anchors, level.height, level.width, 2)
        x_by_row, y_by_column = np.ptp(centre[..., 0], axis=1), np.ptp(centre[..., 1], axis=2)
        if max(x_by_row.max(), y_by_column.max()) > TOLERANCE:
            return False
    return True


def probe_scores(run: Run, heads: Heads) -> tuple[int, bool]:
    """Find the scores, which class they leave out, and what makes them of the logits.

    A score may be masked by a number that is not positive.

    Parameters
    ----------
    run
        Takes channels in the graph's order.

    Returns
    -------
    background
        A class that is sliced off or masked everywhere; -1 when there is none.
    sigmoid
        Whether a score is the sigmoid of its logit, not the softmax over the classes.

    Raises
    ------
    SurgeryError
        When no tensor holds either.
    """
    batch, classes, count = heads.batch or 1, heads.num_classes, heads.num_priors
    logits = np.random.default_rng(1).normal(size=(classes, count))
    logits[np.arange(count) % classes, np.arange(count)] += _BOOST
    logits[:] = _representable(logits)
    every = np.broadcast_to(logits, (batch, classes, count)).astype(np.float32)
    tensors = run(*heads.arrange(np.zeros((batch, 4, count), np.float32), every))
    slices = {(0, classes): -1, (1, classes): 0, (0, classes - 1): classes - 1}
    nearest = np.inf
    for sigmoid, values in itertools.product((False, True), reversed(tensors.values())):
        for (first, last), background in slices.items():
            expected = activate(logits, sigmoid=sigmoid).T[:, first:last]
            scores = _rows(values, heads.order, expected.shape[1])
            if scores is None:
                continue
            shown, clear = scores > 0, expected > 0.5
            difference = float(np.max(np.abs(scores - expected), where=shown, initial=0.0))
            masked = np.flatnonzero(clear.any(axis=0) & ~(shown & clear).any(axis=0))
            if len(masked) > (1 if background == -1 else 0):
                continue
            if difference <= TOLERANCE:
                return int(masked[0]) if len(masked) else background, sigmoid
            nearest = min(nearest, difference)
    what = f"; the nearest differs by {nearest:.2g}" if np.isfinite(nearest) else ""
    raise SurgeryError(
        f"no tensor behind the heads holds the softmax of the logits over {classes} classes, or "
        f"their sigmoid, [N, {classes} or {classes - 1}, {count}] or transposed{what}; other "
        "activations are not supported: export with the one that the network was trained with"
    )


def activate(logits: Floats, *, sigmoid: bool) -> Floats:
    """Scores of logits [C, P]: the sigmoid of each, or the softmax over the classes."""
    if sigmoid:
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logits))
    power = np.exp(logits - logits.max(axis=0))
    return np.asarray(power / power.sum(axis=0))

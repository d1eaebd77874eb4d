"""Experiments on a tail that cuts each level before suppression: what comes in for what is put in.

The part of the graph from the head tensors to its candidates runs on chosen deltas and logits. The
logits are all different where candidates are wanted and very low elsewhere, so that the score of a
candidate tells which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.heads import Heads, Layout
from graph_surgery.probe import BOX_FORMS, TOLERANCE, activate
from graph_surgery.protobuf import Arrays

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.intp]
Run = Callable[[NDArray[np.float32], NDArray[np.float32]], Arrays]

_SILENT = -30.0
"""A logit of no candidate: its sigmoid is 1e-13."""

_LOGITS = (2.0, 6.0)
"""Of candidates: their sigmoids are 0.88 to 0.998, above any threshold in use, and of thousands
each is another float32."""

_ENTERS = 0.85
"""Scores from here on are those of candidates."""


@dataclass(frozen=True)
class Candidates:
    """Where a graph has its candidates, and how they are put in.

    Attributes
    ----------
    run
        From channels in the graph's order to tensors before suppression.
    heads
        With the order in which the graph is taken to have channels.
    scores, boxes
        Tensors of as many rows; of one image or, with a first size N, of several.
    form
        Of `BOX_FORMS`.
    """

    run: Run
    heads: Heads
    scores: str
    boxes: str
    form: str = "ltrb"

    def __call__(self, chosen: Ints, deltas: Floats) -> Floats:
        """Corners [n, 4] of the candidates of some priors [n], each of one class.

        Parameters
        ----------
        deltas
            [n, 4] of these priors.

        Raises
        ------
        SurgeryError
            When others come in, or more, or fewer.
        """
        heads, batch = self.heads, self.heads.batch or 1
        loc = np.zeros((batch, 4, heads.num_priors), np.float32)
        loc[:, :, chosen] = deltas.T
        conf, logits = _silence(heads), _logits(len(chosen))
        conf[:, np.arange(len(chosen)) % heads.num_classes, chosen] = logits
        made = self.run(*heads.arrange(loc, conf))
        scores = first_image(made[self.scores], batch, 1)[:, 0]
        rows = first_image(made[self.boxes], batch, 4)
        (entered,) = np.nonzero(scores > _ENTERS)
        best_first = entered[np.argsort(-scores[entered], kind="stable")]
        expected = np.sort(activate(logits, sigmoid=True))[::-1]
        if len(entered) != len(chosen) or len(rows) != len(scores):
            raise SurgeryError(f"of {len(chosen)} candidates {len(entered)} come in")
        if np.abs(scores[best_first] - expected).max(initial=0) > TOLERANCE:
            raise SurgeryError("scores of candidates are no sigmoid of their logits")
        result = np.empty((len(chosen), 4))
        result[np.argsort(-logits, kind="stable")] = rows[best_first] @ BOX_FORMS[self.form]
        return result

    def entering(self, logits: Floats) -> Floats:
        """Scores that come in, of logits [C, P], highest first."""
        heads, batch = self.heads, self.heads.batch or 1
        conf = np.broadcast_to(logits, (batch, *logits.shape)).astype(np.float32)
        loc = np.zeros((batch, 4, heads.num_priors), np.float32)
        made = self.run(*heads.arrange(loc, conf))
        return np.sort(first_image(made[self.scores], batch, 1)[:, 0])[::-1]

    def order(self, logits: Floats, deltas: Floats) -> Floats:
        """Corners of what comes in with a score above `_ENTERS`, in the graph's order."""
        heads, batch = self.heads, self.heads.batch or 1
        loc, conf = (
            np.broadcast_to(part, (batch, *part.shape)).astype(np.float32)
            for part in (deltas, logits)
        )
        made = self.run(*heads.arrange(loc, conf))
        scores = first_image(made[self.scores], batch, 1)[:, 0]
        rows = first_image(made[self.boxes], batch, 4)
        return np.asarray(rows[scores > _ENTERS] @ BOX_FORMS[self.form])


def _silence(heads: Heads) -> NDArray[np.float32]:
    shape = heads.batch or 1, heads.num_classes, heads.num_priors
    return np.full(shape, _SILENT, np.float32)


def _logits(count: int) -> Floats:
    return np.linspace(*_LOGITS, count)[::-1].astype(np.float32)


def first_image(values: NDArray[Any], batch: int, width: int) -> Floats:
    """Rows [n, width] of the first image."""
    by_image = batch > 1 and values.ndim > (1 if width == 1 else 2) and len(values) == batch
    return np.asarray((values[:1] if by_image else values).reshape(-1, width), np.float64)


def sample(heads: Heads, each: int, rng: np.random.Generator) -> Ints:
    """Priors of the cell in the middle of each level, and others of each level."""
    chosen, start = [], 0
    for level in heads.levels:
        cells = level.height * level.width
        middle = (level.height // 2) * level.width + level.width // 2
        centre = start + np.arange(level.anchors) * cells + middle
        others = np.setdiff1d(np.arange(start, start + level.priors), centre)
        some = rng.choice(others, min(each, len(others)), replace=False)
        chosen += [centre, some]
        start += level.priors
    return np.concatenate(chosen)


def places(run: Run, heads: Heads) -> list[Candidates]:
    """Pairs of tensors that may be the candidates' scores and boxes, the last ones first.

    Raises
    ------
    SurgeryError
        When there is none: no tensor has the sigmoids of the logits that were put in.
    """
    rng, batch = np.random.default_rng(0), heads.batch or 1
    chosen = sample(heads, 8, rng)
    conf, logits = _silence(heads), _logits(len(chosen))
    conf[:, 0, chosen] = logits
    loc = np.zeros((batch, 4, heads.num_priors), np.float32)
    made = run(*heads.arrange(loc, conf))
    wanted = np.sort(activate(logits, sigmoid=True))
    scores: dict[str, int] = {}
    for name, values in made.items():
        if values.dtype.kind == "f" and values.size >= len(wanted):
            rows = first_image(values, batch, 1)[:, 0]
            high = np.sort(rows[rows > _ENTERS])
            if len(high) == len(wanted) and np.abs(high - wanted).max() <= TOLERANCE:
                scores[name] = len(rows)
    found = []
    for name in reversed(made):
        values = made[name]
        if values.dtype.kind != "f" or values.ndim < 2 or values.shape[-1] != 4:
            continue
        count = len(first_image(values, batch, 4))
        found += [
            Candidates(run, heads, score, name)
            for score in reversed(scores)
            if scores[score] == count
        ][:1]
    if not found:
        what = "with as many boxes [n, 4]" if scores else "that are the sigmoids of their logits"
        raise SurgeryError(
            "no tensor before suppression holds the scores of the candidates of all levels, "
            f"{what}: export with the levels' candidates put one after another"
        )
    return found


def layouts(heads: Heads) -> Sequence[Heads]:
    """Heads in every order of channels; that of priors shows in ties alone."""
    flags = [(by_anchor, yx) for by_anchor in (True, False) for yx in (False, True)]
    return [replace(heads, layout=Layout(one, False, other)) for one, other in flags]

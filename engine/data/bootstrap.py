"""How sure a difference in mAP is: paired bootstrap over images.

Images are drawn with replacement, the same ones for both sides, and the mAP of what was drawn is
computed for both; the middle 95 % of the ratios is the interval (B. Efron, R. Tibshirani, "An
Introduction to the Bootstrap", 1993, chapters 8 and 13: paired data, percentile interval). What
COCOeval matched within an image does not change with the draw, so that an image that is drawn n
times is one that counts n times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError

SAMPLES = 1000
"""Draws of an interval."""

_LEVEL = 0.95


@dataclass(frozen=True)
class Matches:
    """What COCOeval found of one category, over all object sizes, the highest score first.

    Attributes
    ----------
    images
        int64 [D]: position of the image of every detection.
    hits, counted
        bool [T, D]: whether it has a partner at each of the T overlaps; whether it counts.
    truths
        int64 [N]: objects of every image that count.
    """

    images: NDArray[np.int64]
    hits: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    truths: NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """The mAP over that of a reference: on all images, and the ends of its interval."""

    ratio: float
    low: float
    high: float


def matches(evaluation: Any) -> list[Matches]:
    """Take the matches of `engine.data.coco.coco_evaluation`, by category."""
    count = len(evaluation.params.imgIds)
    every = len(evaluation.params.areaRng) * count
    overlaps = len(evaluation.params.iouThrs)
    found = []
    for start in range(0, len(evaluation.evalImgs), every):
        parts = [  # the first range of sizes is all of them
            (image, one)
            for image, one in enumerate(evaluation.evalImgs[start : start + count])
            if one is not None
        ]
        truths = np.zeros(count, np.int64)
        for image, one in parts:
            truths[image] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
        scores = np.concatenate([np.zeros(0), *(one["dtScores"] for _, one in parts)])
        order = np.argsort(-scores, kind="stable")
        images = np.repeat(
            np.array([image for image, _ in parts], np.int64),
            [len(one["dtScores"]) for _, one in parts],
        )
        none = np.zeros((overlaps, 0))
        hits, ignored = (
            np.concatenate([none, *(one[key] for _, one in parts)], axis=1)[:, order] != 0
            for key in ("dtMatches", "dtIgnore")
        )
        found.append(Matches(images[order], hits, ~ignored, truths))
    return found


def average_precision(
    categories: Sequence[Matches], weights: NDArray[np.int64], recalls: NDArray[np.float64]
) -> float:
    """COCO's AP where image i counts weights[i] times; NaN where no object is left.

    Parameters
    ----------
    weights
        int64 [N].
    recalls
        Where precision is read off, `COCOeval.params.recThrs`.
    """
    values = []
    for category in categories:
        truths = int(category.truths @ weights)
        if not truths:
            continue
        weight = weights[category.images] * category.counted
        hits = np.cumsum(weight * category.hits, axis=1)
        every = np.cumsum(weight, axis=1)
        precision = hits / np.maximum(every, 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for recall, best in zip(hits / truths, envelope, strict=True):
            at = np.searchsorted(recall, recalls, side="left")
            values.append(np.append(best, 0.0)[at].mean())
    return float(np.mean(values)) if values else float("nan")


def draws(evaluation: Any, *, seed: int = 0, samples: int = SAMPLES) -> NDArray[np.float64]:
    """The mAP of all images, then that of every draw, float64 [1 + samples].

    Parameters
    ----------
    evaluation
        Of `engine.data.coco.coco_evaluation`. As many images and the same seed: the same draws.

    Raises
    ------
    EngineError
        When the mAP is not above 0.
    """
    if not evaluation.stats[0] > 0:
        raise EngineError("a model finds none of the objects: there is nothing to compare")
    recalls, found = evaluation.params.recThrs, matches(evaluation)
    count = len(evaluation.params.imgIds)
    random = np.random.default_rng(seed)
    weights = (
        np.bincount(random.integers(count, size=count), minlength=count) for _ in range(samples)
    )
    every = np.ones(count, np.int64)
    return np.array([average_precision(found, one, recalls) for one in (every, *weights)])


def interval(reference: NDArray[np.float64], other: NDArray[np.float64]) -> Interval:
    """Interval of the ratio of two mAPs, from the `draws` of both, of the same images in order."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = other / reference
    drawn = ratios[1:][np.isfinite(ratios[1:])]
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(ratios[0]), float(low), float(high))

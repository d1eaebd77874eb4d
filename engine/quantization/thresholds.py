"""Thresholds of symmetric INT8 from a histogram, and what each of them costs.

A threshold is the magnitude that the largest step stands for; larger values are clipped to it. Its
squared error is that of the clipped values, that of values below half a step, which become 0, and
that of rounding the others, which is uniform within a step: step² / 12 a value (B. Widrow, "A study
of rough amplitude quantization", 1956).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.quantization.histogram import BINS, Histogram

STEPS = 127
"""Steps of symmetric INT8 between 0 and the threshold."""

LEVELS = STEPS + 1
"""Magnitudes that symmetric INT8 tells apart, 0 to 127."""

ENOUGH = 1.1
"""Squared error over the least one that the method `auto` takes for less clipping."""

METHODS = ("auto", "entropy", "minmax")
"""Names that `threshold` knows; the first is the default."""


def threshold(histogram: Histogram, method: str) -> float:
    """Magnitude that the largest INT8 step stands for; larger values are clipped.

    Parameters
    ----------
    histogram
        All values of a tensor.
    method
        One of `METHODS`: ``auto``, the least sum over the images of an image's squared error over
        the power of its values: one image of huge values has one vote, where the squared error
        over all values would be its own, and images that show nothing have none; of thresholds
        whose sum is within `ENOUGH` of the least, the largest; ``entropy``, the least
        Kullback-Leibler divergence between the distribution and its INT8 version (S. Migacz,
        "8-bit inference with TensorRT", GTC 2017); ``minmax``, the largest magnitude.

    Returns
    -------
    float
        At most the largest magnitude; 0 for a tensor that is 0 everywhere.
    """
    if histogram.largest == 0:
        return 0.0
    if method == "minmax":
        return histogram.largest
    if method == "entropy":
        bins = _entropy_bins(histogram.counts)
    else:
        counts = _voting(histogram)
        errors = _squared_errors(histogram, counts)[: _used(counts)]
        bins = int(np.flatnonzero(errors <= ENOUGH * errors.min())[-1]) + 1
    return min(bins * histogram.limit / BINS, histogram.largest)


def clipped_share(histogram: Histogram, limit: float) -> float:
    """Share of the values beyond a threshold, to the bin, in [0, 1]."""
    return float(histogram.counts[_bins(histogram, limit) :].sum() / histogram.counts.sum())


def snr_db(histogram: Histogram, limit: float) -> float:
    """Power of the values over that of their quantisation error at a threshold > 0, in dB.

    Every image that shows something counts alike, whatever the size of its values. It is infinite
    without an error, as for a tensor that is 0 everywhere.
    """
    counts = _voting(histogram)
    signal = float(counts @ np.square(histogram.centres()))
    error = float(_squared_errors(histogram, counts)[_bins(histogram, limit) - 1])
    return 10 * math.log10(signal / error) if error else math.inf


def _voting(histogram: Histogram) -> NDArray[np.float64]:
    """What the error is summed over, float64 [BINS]; all values where no image has a vote."""
    return histogram.shares if histogram.shares.any() else histogram.counts.astype(np.float64)


def _bins(histogram: Histogram, limit: float) -> int:
    """How many of the first bins a threshold keeps, at least 1."""
    return min(max(math.ceil(limit / histogram.limit * BINS), 1), BINS) if histogram.limit else BINS


def _used(counts: NDArray[Any]) -> int:
    return int(np.flatnonzero(counts)[-1]) + 1


def _squared_errors(histogram: Histogram, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the squared errors with the threshold at the upper end of each bin, float64 [BINS].

    Values in the first bin are taken for zeros, which are exact at any scale: a ReLU makes most
    values 0.
    """
    centres = histogram.centres()
    limits = (np.arange(BINS) + 1) * (histogram.limit / BINS)
    # sum over the bins above of n (x - t)² = sum n x² - 2 t sum n x + t² sum n
    above = [_sum_above(counts * power) for power in (centres**2, centres, np.ones(BINS))]
    clipped = np.maximum(above[0] - 2 * limits * above[1] + limits**2 * above[2], 0)
    # bins of which a step makes 0, the first left out
    zeroed = (np.arange(BINS) + 1) // (2 * STEPS)
    lost, many = (
        np.append(0, np.cumsum(np.append(0, (counts * power)[1:])))[zeroed]
        for power in (centres**2, np.ones(BINS))
    )
    rounded = lost + np.square(limits / STEPS) / 12 * (counts[1:].sum() - many)
    error: NDArray[np.float64] = clipped + rounded
    return error


def _sum_above(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of all later values, for each value."""
    return np.append(np.cumsum(values[:0:-1])[::-1], 0.0)


def _entropy_bins(counts: NDArray[np.int64]) -> int:
    """How many of the first bins to keep for the least divergence.

    As in NVIDIA's calibrators, the first bin is taken to hold as many values as the second: a ReLU
    makes most values 0, which is represented exactly at any scale and must not weigh in.

    With P the kept bins, to whose last occupied one the clipped values are added, and Q their
    version in `LEVELS` levels, each spread evenly over its occupied bins, the divergence is
    sum P log P - sum P log Q. Both sums are differences of running sums, for every number of bins.
    """
    reference = counts.astype(np.float64)
    reference[0] = reference[1]
    used = _used(counts)
    kept = np.arange(LEVELS, used + 1)
    mass = np.append(0, np.cumsum(reference))
    occupied = np.append(0, np.cumsum(reference > 0))
    kept = kept[mass[kept] > 0]
    if not kept.size:
        return used
    total, inside = mass[-1], mass[kept]
    last = np.maximum.accumulate(np.where(reference > 0, np.arange(len(reference)), 0))[kept - 1]
    share = reference / total
    own = _x_log_x(share)
    excess = (total - inside) / total
    p_log_p = np.append(0, np.cumsum(own))[last] + _x_log_x(share[last] + excess)
    edges = -(-np.arange(LEVELS + 1) * kept[:, None] // LEVELS)  # first bin of every level
    level_mass, level_bins = np.diff(mass[edges], axis=1), np.diff(occupied[edges], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_q = np.log(level_mass / level_bins / inside[:, None])
    p_log_q = np.where(level_mass > 0, level_mass * log_q, 0).sum(axis=1) / total
    p_log_q += excess * log_q[np.arange(len(kept)), last * LEVELS // kept]
    return int(kept[np.argmin(p_log_p - p_log_q)])


def _x_log_x(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values * np.log(np.where(values > 0, values, 1))

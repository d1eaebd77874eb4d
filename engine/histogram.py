"""Histograms of magnitudes that grow with what they see, and the thresholds drawn from them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Bins of a histogram; between half of them and all lie below the largest magnitude."""

LEVELS = 128
"""Magnitudes that symmetric INT8 tells apart, 0 to 127."""

PERCENTILE = 99.99
"""Share of the magnitudes, in per cent, that the method `percentile` leaves unclipped."""

METHODS = ("entropy", "percentile", "minmax")
"""Names that `threshold` knows; the first is the default."""

_CHUNK = 1 << 15  # values worked on at a time: their copies stay in the CPU's cache
_LEAST_LIMIT = 2.0**-100  # so that float32 holds bins per unit


class Histogram:
    """Counts of magnitudes in `BINS` bins over [0, limit).

    The limit is a power of two, twice it where a larger value comes: then two bins become one.
    So the counts are exact, and the same for any order and any batching of the values.

    Attributes
    ----------
    counts
        int64 [BINS].
    limit
        Upper end of the last bin; 0 as long as all values were 0.
    largest
        Largest magnitude.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values, float32 of any shape.

        Raises
        ------
        ValueError
            When one is NaN or infinite; nothing is counted then.
        """
        flat = values.reshape(-1)
        if not flat.size:
            return
        largest = max(float(flat.max()), -float(flat.min()))
        if not math.isfinite(largest):
            raise ValueError("a value is NaN or infinite")
        if largest >= self.limit:
            self._widen(largest)
        self.largest = max(self.largest, largest)
        if self.limit == 0:
            self.counts[0] += flat.size
            return
        per_unit = np.float32(BINS / self.limit)
        scaled = np.empty(min(_CHUNK, flat.size), np.float32)
        bins = np.empty(scaled.size, np.intp)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            part, index = scaled[: chunk.size], bins[: chunk.size]
            np.abs(chunk, out=part)
            np.multiply(part, per_unit, out=part)
            np.copyto(index, part, casting="unsafe")
            self.counts += np.bincount(index, minlength=BINS)

    def _widen(self, largest: float) -> None:
        if largest == 0:
            return
        limit = max(2.0 ** math.frexp(largest)[1], _LEAST_LIMIT)  # the power of two above
        while 0 < self.limit < limit and self.counts[1:].any():
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        self.limit = limit


def threshold(histogram: Histogram, method: str) -> float:
    """Magnitude that the largest INT8 step stands for; larger values are clipped.

    Parameters
    ----------
    histogram
        All values of a tensor.
    method
        One of `METHODS`: ``entropy``, the least Kullback-Leibler divergence between the
        distribution and its INT8 version (S. Migacz, "8-bit inference with TensorRT", GTC 2017);
        ``percentile``, `PERCENTILE`; ``minmax``, the largest magnitude.

    Returns
    -------
    float
        At most the largest magnitude; 0 for a tensor that is 0 everywhere.
    """
    if histogram.largest == 0:
        return 0.0
    width = histogram.limit / BINS
    if method == "minmax":
        return histogram.largest
    if method == "percentile":
        below = np.cumsum(histogram.counts)
        wanted = PERCENTILE / 100 * float(below[-1])
        bins = int(np.searchsorted(below, wanted)) + 1
    else:
        bins = _entropy_bins(histogram.counts)
    return min(bins * width, histogram.largest)


def _entropy_bins(counts: NDArray[np.int64]) -> int:
    """How many of the first bins to keep for the least divergence.

    As in NVIDIA's calibrators, the first bin is taken to hold as many values as the second: a ReLU
    makes most values 0, which is represented exactly at any scale and must not weigh in.
    """
    reference = counts.astype(np.float64)
    reference[0] = reference[1]
    used = int(np.flatnonzero(counts)[-1]) + 1
    sums = np.cumsum(reference)
    total = sums[-1]
    best, least = used, math.inf
    for kept in range(LEVELS, used + 1):
        inside = reference[:kept]
        if not sums[kept - 1]:
            continue
        occupied = inside > 0
        level = np.arange(kept) * LEVELS // kept
        mass = np.bincount(level, inside, LEVELS)
        share = np.bincount(level, occupied, LEVELS)
        with np.errstate(invalid="ignore"):
            quantised = (mass / share)[level][occupied] / sums[kept - 1]
        clipped = inside[occupied] / total
        clipped[-1] += (total - sums[kept - 1]) / total
        divergence = float(clipped @ np.log(clipped / quantised))
        if divergence < least:
            best, least = kept, divergence
    return best

"""Histograms of magnitudes that grow with what they see."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Bins of a histogram; between half of them and all lie below the largest magnitude."""

NO_NUMBER = "a value is NaN or infinite"

_CHUNK = 1 << 17  # values worked on at a time: their copies stay in the CPU's cache
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
            When one is NaN or infinite; those before it may be counted.
        """
        import cv2

        flat = values.reshape(-1)
        scaled = np.empty(min(_CHUNK, flat.size), np.float32)
        bins = np.empty(scaled.size, np.uint16)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            part, index = scaled[: chunk.size], bins[: chunk.size]
            np.abs(chunk, out=part)
            largest = float(part.max())
            if not math.isfinite(largest):
                raise ValueError(NO_NUMBER)
            if largest >= self.limit:
                self._widen(largest)
            self.largest = max(self.largest, largest)
            if self.limit == 0:
                self.counts[0] += chunk.size
                continue
            np.multiply(part, np.float32(BINS / self.limit), out=part)
            np.copyto(index, part, casting="unsafe")
            # faster than anything of NumPy's; its float32 counts are exact up to 2^24
            counts = cv2.calcHist([index[None]], [0], None, [BINS], [0, BINS])
            self.counts += counts.ravel().astype(np.int64)

    def _widen(self, largest: float) -> None:
        if largest == 0:
            return
        limit = max(2.0 ** math.frexp(largest)[1], _LEAST_LIMIT)  # the power of two above
        while 0 < self.limit < limit and self.counts[1:].any():
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        self.limit = limit


def magnitude(values: NDArray[np.float32]) -> float:
    """Largest magnitude of values of any shape; 0 without any.

    Raises
    ------
    ValueError
        When one is NaN or infinite.
    """
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if not math.isfinite(largest):
        raise ValueError(NO_NUMBER)
    return largest

"""Histograms of magnitudes that grow with what they see, of an image or of many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Bins of a histogram; between half of them and all lie below the largest magnitude."""

NO_NUMBER = "a value is NaN or infinite"

_CHUNK = 1 << 17  # values worked on at a time: their copies stay in the CPU's cache
_BITS = 8
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
    shares
        float64 [BINS]: the counts of every image that `add_image` was given, over the sum of its
        squares, to `_BITS` bits, so that sums are exact and the same in any order, unless the
        squares of images differ by more than 2^20 or so.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0
        self.shares: NDArray[np.float64] = np.zeros(BINS)

    def add_image(self, image: Histogram, *, shows: bool = True) -> None:
        """Count all values of an image.

        Parameters
        ----------
        image
            What `add` made of its values alone.
        shows
            Whether it takes part in `shares`.
        """
        self._widen(image.largest)
        self.largest = max(self.largest, image.largest)
        counts = image.counts
        for _ in range(_doublings(image.limit, self.limit)):
            counts = _halved(counts)
        self.counts += counts
        power = float(image.counts[1:] @ np.square(image.centres()[1:]))
        if shows and image.limit and power:
            part, exponent = math.frexp(1 / power)
            self.shares += counts * math.ldexp(round(part * 2**_BITS), exponent - _BITS)

    def centres(self) -> NDArray[np.float64]:
        """Middle of every bin, float64 [BINS]."""
        centres: NDArray[np.float64] = (np.arange(BINS, dtype=np.float64) + 0.5) * (
            self.limit / BINS
        )
        return centres

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
        if largest == 0 or largest < self.limit:
            return
        limit = max(2.0 ** math.frexp(largest)[1], _LEAST_LIMIT)  # the power of two above
        if self.counts[1:].any():
            for _ in range(_doublings(self.limit, limit)):
                self.counts, self.shares = _halved(self.counts), _halved(self.shares)
        self.limit = limit


def _doublings(limit: float, wider: float) -> int:
    """How often two bins become one between two limits, powers of two; 0 is that of zeros alone."""
    return math.frexp(wider)[1] - math.frexp(limit)[1] if limit else 0


def _halved(counts: NDArray[Any]) -> NDArray[Any]:
    """Two bins as one, empty ones behind them."""
    return np.append(counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, counts.dtype))


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

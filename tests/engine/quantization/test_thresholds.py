"""Thresholds against their definitions, by brute force on the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.quantization.histogram import BINS, Histogram
from engine.quantization.thresholds import (
    ENOUGH,
    LEVELS,
    METHODS,
    _entropy_bins,
    clipped_share,
    snr_db,
    threshold,
)


def histogram_of(values):
    histogram = Histogram()
    histogram.add(np.float32(values))
    return histogram


DISTRIBUTIONS = {
    "half normal": lambda rng: np.abs(rng.standard_normal(200_000)),
    "Laplace": lambda rng: np.abs(rng.laplace(size=200_000)),
    "gamma": lambda rng: rng.gamma(3, size=200_000),
    "outliers": lambda rng: np.append(np.abs(rng.standard_normal(200_000)), np.linspace(6, 18, 20)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_entropy_agrees_with_onnxruntime(name) -> None:
    """ONNX Runtime searches a signed histogram: mirrored, with twice the levels, it is ours."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    bins = 640
    values = DISTRIBUTIONS[name](np.random.default_rng(7))
    counts, edges = np.histogram(values, bins, range=(0, values.max()))
    ours = edges[_entropy_bins(counts)]
    mirrored = np.concatenate([counts[:0:-1], [2 * counts[0]], counts[1:]])
    signed = np.linspace(-edges[-1], edges[-1], 2 * bins).astype(np.float32)
    top = np.float32(values.max())
    collector = HistogramCollector("entropy", True, 2 * bins - 1, 255, None, None)
    _, high = collector.get_entropy_threshold((mirrored, signed, -top, top, top), 255)
    if name == "outliers":
        # both clip the outliers; ONNX Runtime's levels are all one bin wide up to twice the least
        # number of bins, so that it clips some of the normal values, too
        assert high <= ours < 6
    else:
        assert ours == pytest.approx(float(high), rel=0.1)


def test_many_zeros_do_not_weigh_in() -> None:
    """A ReLU's zeros are exact at any scale, so they must not move the threshold."""
    values = np.abs(np.random.default_rng(3).standard_normal(100_000)).astype(np.float32)
    dense, sparse = Histogram(), Histogram()
    dense.add(values)
    sparse.add(np.concatenate([values, np.zeros(900_000, np.float32)]))
    assert threshold(sparse, "entropy") == pytest.approx(threshold(dense, "entropy"), rel=0.05)


def test_a_tensor_of_zeros_has_the_threshold_zero() -> None:
    histogram = Histogram()
    histogram.add(np.zeros((2, 3), np.float32))
    assert [threshold(histogram, method) for method in METHODS] == [0] * len(METHODS)
    assert snr_db(histogram, 1.0) == math.inf


@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, BINS))
@settings(max_examples=25)
def test_entropy_is_the_least_divergence(seed, empty, used) -> None:
    random = np.random.default_rng(seed)
    counts = np.int64(random.lognormal(3, 3, BINS)) * (random.uniform(size=BINS) > empty)
    counts[used:] = 0
    counts[used - 1] += 1

    def divergence(kept):
        """Of the kept bins, the last of which takes what is clipped, from their levels."""
        reference = counts.astype(float)
        reference[0] = reference[1]
        inside = reference[:kept]
        if not inside.sum():
            return math.inf
        level = np.arange(kept) * LEVELS // kept
        occupied = inside > 0
        mass, share = np.bincount(level, inside), np.bincount(level, occupied)
        quantised = mass[level][occupied] / share[level][occupied] / inside.sum()
        clipped = inside[occupied] / reference.sum()
        clipped[-1] += reference[kept:].sum() / reference.sum()
        return float(clipped @ np.log(clipped / quantised))

    found = _entropy_bins(counts)
    tried = range(LEVELS, used + 1, max(1, used // 150))
    least = min((divergence(kept) for kept in tried), default=math.inf)
    assert divergence(found) <= least + 1e-9 or least == math.inf


def errors_of(values, limits):
    """Squared error of the values in INT8 steps, for each threshold."""
    values = np.float64(values)
    steps = np.asarray(limits)[:, None] / 127
    rounded = np.clip(np.rint(values / steps), -127, 127) * steps
    return np.square(values - rounded).sum(axis=1)


def of_images(images, shows=None):
    histogram = Histogram()
    for index, image in enumerate(images):
        histogram.add_image(histogram_of(image), shows=shows is None or shows[index])
    return histogram


def images_of(random, sizes):
    """What a ReLU leaves of a Laplace distribution, of several sizes."""
    return [
        np.float32(np.maximum(size * random.laplace(size=random.integers(4000, 30_000)), 0))
        for size in sizes
    ]


@pytest.mark.parametrize("seed", range(4))
def test_auto_is_the_largest_with_nearly_the_least_share_of_every_image(seed) -> None:
    random = np.random.default_rng(seed)
    images = images_of(random, random.lognormal(0, 0.7, 5))
    largest = max(image.max() for image in images)

    def cost(limits):
        return sum(errors_of(i, limits) / np.square(np.float64(i)).sum() for i in images)

    found = threshold(of_images(images), "auto")
    least = cost(np.linspace(0.02, 1, 400) * largest).min()
    ours, larger = cost([found, min(1.05 * found, largest)])
    # rounding is taken for uniform, and a threshold is to a bin
    assert ours <= 1.1 * ENOUGH * least
    assert found == largest or larger > 0.97 * ENOUGH * least


def test_one_image_of_huge_values_does_not_decide() -> None:
    random = np.random.default_rng(1)
    images = images_of(random, [1] * 31)
    alone = threshold(of_images(images), "auto")
    huge = 40 * images_of(random, [1])[0]
    found = threshold(of_images([*images, huge]), "auto")
    assert found < huge.max() / 2
    # all values as one, the rest would be lost
    assert threshold(histogram_of(np.concatenate([*images, huge])), "auto") > 1.3 * found
    assert alone <= found


def test_images_that_show_nothing_have_no_vote_unless_all_do() -> None:
    random = np.random.default_rng(2)
    images = images_of(random, [1, 1, 0.01, 0.01])
    shows = [True, True, False, False]
    together = threshold(of_images(images, shows), "auto")
    assert together == threshold(of_images(images[:2]), "auto")
    assert together != threshold(of_images(images), "auto")
    none = of_images(images, [False] * 4)
    assert threshold(none, "auto") == threshold(histogram_of(np.concatenate(images)), "auto")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_clipped_share_and_snr_are_those_of_the_values(name, method) -> None:
    values = np.float32(DISTRIBUTIONS[name](np.random.default_rng(4)))
    values[::3] = 0
    histogram = histogram_of(values)
    limit = threshold(histogram, method)
    assert clipped_share(histogram, limit) == pytest.approx((values > limit).mean(), abs=1e-4)
    signal, error = float(np.square(values.astype(float)).sum()), errors_of(values, [limit])[0]
    assert snr_db(histogram, limit) == pytest.approx(10 * math.log10(signal / error), abs=0.3)


@pytest.mark.parametrize("largest", [2.0**-120, 1e-38, 1e30])
def test_extreme_sizes(largest) -> None:
    histogram = histogram_of(np.linspace(0, largest, 1000))
    for method in METHODS:
        limit = threshold(histogram, method)
        assert 0 < limit <= np.float32(largest)
        assert snr_db(histogram, limit) > 20
        assert 0 <= clipped_share(histogram, limit) <= 0.1

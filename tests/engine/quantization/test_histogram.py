"""Running histograms against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.quantization.histogram import BINS, Histogram


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.floats(-(2.0**40), 2.0**40, width=32) | st.floats(-3, 3, width=32),
    ),
    st.lists(st.integers(0, 400), max_size=4),
)
def test_a_histogram_is_exact_in_any_pieces(values, cuts) -> None:
    histogram = Histogram()
    for part in np.split(values, sorted(cuts)):
        histogram.add(part)
    magnitudes = np.abs(values.astype(np.float64))
    assert histogram.largest == magnitudes.max()
    if histogram.largest == 0:
        assert histogram.counts.tolist() == [len(values)] + [0] * (BINS - 1)
        return
    if histogram.largest > 2**-100:
        assert histogram.limit / 2 <= histogram.largest < histogram.limit
    index = np.floor(magnitudes / (histogram.limit / BINS)).astype(int)
    np.testing.assert_array_equal(histogram.counts, np.bincount(index, minlength=BINS))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_histogram_refuses_what_is_no_number(value) -> None:
    histogram = Histogram()
    histogram.add(np.float32([1, 2]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        histogram.add(np.float32([1, value, 3]))
    assert (histogram.counts.sum(), histogram.largest) == (2, 2)


@given(
    st.lists(
        hnp.arrays(
            np.float32,
            st.integers(1, 60),
            elements=st.floats(-8, 8, width=32) | st.floats(-0.125, 0.125, width=32),
        ),
        min_size=1,
        max_size=5,
    ),
    st.data(),
)
def test_images_come_together_in_any_order(images, data) -> None:
    """The counts are those of all values, and every image has the same share of them."""
    shows = [data.draw(st.booleans()) for _ in images]

    def together(order):
        histogram = Histogram()
        for index in order:
            one = Histogram()
            one.add(images[index])
            histogram.add_image(one, shows=shows[index])
        return histogram

    found = together(range(len(images)))
    every = Histogram()
    every.add(np.concatenate(images))
    assert (found.limit, found.largest) == (every.limit, every.largest)
    np.testing.assert_array_equal(found.counts, every.counts)
    other = together(data.draw(st.permutations(range(len(images)))))
    np.testing.assert_array_equal(found.shares, other.shares)
    if not any(shows):
        assert not found.shares.any()
    width = found.limit / BINS
    wanted = np.zeros(BINS)
    for image, one in zip(images, shows, strict=True):
        values = np.abs(image.astype(np.float64))
        if one and values.max() > 2**-100:
            own = 2.0 ** np.frexp(values.max())[1] / BINS  # the image's own bins
            power = np.square(np.where(values < own, 0, (np.floor(values / own) + 0.5) * own))
            wanted += np.bincount((values / width).astype(int), minlength=BINS) / power.sum()
    np.testing.assert_allclose(found.shares, wanted, rtol=2**-8)

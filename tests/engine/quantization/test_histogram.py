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

"""What LoadGen is given of an engine's outputs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from harness.loadgen.response import check_outputs, pack
from tests.support.harness_fakes import KEEP, detect


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=9), st.data())
def test_payloads(indices, data):
    keep = data.draw(st.integers(1, 6))
    counts = np.array([data.draw(st.integers(0, keep)) for _ in indices], np.int32)
    seed = data.draw(st.integers(0, 99))
    detections = np.random.default_rng(seed).random((len(indices), keep, 7), np.float32)
    before = detections.copy()
    rows, sizes = pack(detections, counts, np.array(indices))
    payload = rows.tobytes()
    start = 0
    for index, count, size, image in zip(indices, counts, sizes, before, strict=True):
        expected = image[:count].copy()
        expected[:, 0] = index
        assert payload[start : start + size] == expected.astype("<f4").tobytes()
        start += size
    assert start == len(payload)
    np.testing.assert_array_equal(detections, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_valid_rows_must_be_finite(value):
    detections, counts = detect(np.full((2, 3, 4, 4), 2, np.float32))
    detections[1, 3, 5] = value
    pack(detections, counts, np.array([0, 1]))
    detections[1, 1, 5] = value
    with pytest.raises(EngineError, match="NaN"):
        pack(detections, counts, np.array([0, 1]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d, c: (d[:1], c),
        lambda d, c: (d, c[:1]),
        lambda d, c: (d[..., :6], c),
        lambda d, c: (d.reshape(-1, 7), c),
        lambda d, c: (d.astype(np.float16), c),
        lambda d, c: (d, c.astype(np.int64)),
        lambda d, _: (d, np.array([0, -1], np.int32)),
        lambda d, _: (d, np.array([0, KEEP + 1], np.int32)),
    ],
)
def test_outputs_out_of_the_protocol_are_refused(spoil):
    detections, counts = detect(np.zeros((2, 3, 4, 4), np.float32))
    check_outputs(detections, counts, 2)
    with pytest.raises(EngineError, match="the engine returned"):
        check_outputs(*spoil(detections, counts), 2)

"""What LoadGen is given of an engine's outputs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from harness.loadgen.response import check_outputs, pack
from tests.support.harness_fakes import KEEP, SHAPE, WRONG, detect


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=9), st.data())
def test_payloads(indices, data):
    keep = data.draw(st.integers(1, 6))
    counts = np.array([data.draw(st.integers(0, keep)) for _ in indices], np.int32)
    seed = data.draw(st.integers(0, 99))
    detections = np.random.default_rng(seed).random((len(indices), keep, 7), np.float32)
    before = detections.copy()
    rows, sizes = pack(detections, counts, np.array(indices), checked=False)
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


IMAGES = np.full((3, *SHAPE), 3, np.float32) + np.arange(3)[:, None, None, None]
"""For which `detect` finds 3, 4 and 5 boxes."""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("images", r"image index .* another order\? \(image 0 of a batch: 2, 0.005, "),
        ("fraction", r"label outside 1\.\.80 \(image 0 of a batch: .* 4\.5\)"),
        ("background", r"label outside 1\.\.80"),
        ("label", r"label outside 1\.\.80 \(image 0 of a batch: .* 81\)"),
        ("scores", r"a higher score than the row before \(image 0"),
        ("corners", r"corners are swapped \(image 0 of a batch: 0, 0\.997, "),
    ],
)
def test_rows_that_contradict_themselves_are_refused(wrong, message):
    detections, counts = detect(IMAGES)
    pack(detections, counts, [7, 8, 9], labels=range(1, 81))
    detections, counts = WRONG[wrong](detections, counts)
    with pytest.raises(EngineError, match=message):
        pack(detections, counts, [7, 8, 9], labels=range(1, 81))
    pack(detections, counts, [7, 8, 9], labels=range(1, 81), checked=False)


def test_the_first_label_may_be_0():
    detections, counts = detect(IMAGES)
    detections[0, 0, 6] = 0
    pack(detections, counts, [7, 8, 9], labels=range(80))
    detections[0, 0, 6] = 80
    with pytest.raises(EngineError, match=r"label outside 0\.\.79"):
        pack(detections, counts, [7, 8, 9], labels=range(80))


def test_what_belongs_to_no_row_may_be_anything():
    """Behind the valid rows, and from one image to the next."""
    detections, counts = detect(IMAGES)
    detections[0, 3:] = [9, 1, 1, 0, 0, 7, -3]
    pack(detections, counts, [7, 8, 9], labels=range(1, 81))
    detections[1, :, 5] += 5  # higher than all of the first image
    detections[2, :, 6] = 10_000
    pack(detections, counts, [7, 8, 9])
    pack(detections, np.zeros_like(counts), [7, 8, 9])


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

"""Matching detections: by the definition and by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.matching import box_iou, match_detections
from tests.support.boxes import iou


def rows_of(boxes):
    """Detections of tuples (ymin, xmin, height, width, score, label)."""
    found = [(0, y, x, y + h, x + w, score, label) for y, x, h, w, score, label in boxes]
    return np.array(found, np.float32).reshape(-1, 7)


unit = st.floats(0, 1, width=32)
box = st.tuples(unit, unit, unit, unit, unit, st.integers(1, 2))


@given(st.lists(box, max_size=5), st.lists(box, max_size=5))
def test_iou_is_that_of_the_definition(first, second):
    a, b = rows_of(first)[:, 1:5], rows_of(second)[:, 1:5]
    expected = [[iou(x, y) for y in b.astype(float)] for x in a.astype(float)]
    np.testing.assert_allclose(
        box_iou(a, b), np.array(expected).reshape(len(a), len(b)), rtol=1e-9, atol=1e-12
    )


grid_box = st.tuples(
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 0.5]),
    st.floats(0.3125, 0.34375, width=32),
    st.floats(0.3125, 0.34375, width=32),
    unit,
    st.integers(1, 2),
)


@given(st.lists(grid_box, max_size=4), st.lists(grid_box, max_size=4), st.sampled_from([0.9, 0.98]))
def test_matching_finds_what_brute_force_finds(first, second, least):
    # what comes out of NMS: at most one box of a label at a place
    a, b = (
        rows_of({(entry[0], entry[1], entry[5]): entry for entry in boxes}.values())
        for boxes in (first, second)
    )
    allowed = [
        [x[6] == y[6] and iou(x[1:5].astype(float), y[1:5].astype(float)) >= least for y in b]
        for x in a
    ]
    short, long = sorted((len(a), len(b)))
    table = np.array(allowed, bool).reshape(len(a), len(b))
    table = table if len(a) <= len(b) else table.T
    best = max(
        sum(table[row, column] for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(long), short)
    )
    found = match_detections(a, b, least)
    assert len(found.pairs) == best
    assert (found.missed, found.extra) == (len(a) - best, len(b) - best)
    for (row, column), overlap, change in zip(
        found.pairs, found.iou, found.score_difference, strict=True
    ):
        assert allowed[row][column]
        assert overlap == pytest.approx(
            iou(a[row, 1:5].astype(float), b[column, 1:5].astype(float))
        )
        assert change == float(b[column, 5]) - float(a[row, 5])


def test_boxes_clipped_to_a_line_match():
    line = rows_of([(1.0, 0.2, 0.0, 0.6, 0.5, 1)])
    other = rows_of([(1.0, 0.200002, 0.0, 0.6, 0.5, 1), (0.0, 0.2, 0.0, 0.6, 0.5, 1)])
    assert match_detections(line, other).pairs.tolist() == [[0, 0]]


@given(st.lists(box, max_size=6), st.lists(box, max_size=6), st.sampled_from([0.0, 0.3, 0.9]))
def test_matching_is_one_to_one_and_leaves_no_pair(first, second, least):
    a, b = rows_of(first), rows_of(second)
    found = match_detections(a, b, least)
    rows, columns = found.pairs.T
    assert len(set(rows)) == len(rows) == len(a) - found.missed
    assert len(set(columns)) == len(columns) == len(b) - found.extra
    assert (found.iou >= least).all() and (np.diff(found.iou) <= 0).all()
    for row in set(range(len(a))) - set(rows):
        for column in set(range(len(b))) - set(columns):
            overlap = iou(a[row, 1:5].astype(float), b[column, 1:5].astype(float))
            assert a[row, 6] != b[column, 6] or overlap < least + 1e-9

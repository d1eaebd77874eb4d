"""Accuracy logs whose rows are in another order or unit: said, with what they seem to be."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from harness.results.accuracy import evaluate

IDS = [3, 7, 20]


@pytest.fixture
def scene(tmp_path):
    """Annotations, and the rows of a detector that finds all of it."""
    rng = np.random.default_rng(3)
    images, annotations, rows = [], [], []
    for sample in range(12):
        width, height = (int(side) for side in rng.integers(200, 400, 2))
        images.append(
            {"id": sample, "file_name": f"{sample}.jpg", "width": width, "height": height}
        )
        for _ in range(4):
            w, h = rng.uniform(20, 90, 2)
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            label = int(rng.integers(1, 4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample,
                    "category_id": IDS[label - 1],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
            corners = [y / height, x / width, (y + h) / height, (x + w) / width]
            rows.append([sample, *corners, rng.uniform(0.5, 1), label])
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": one, "name": str(one)} for one in IDS],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    return tmp_path, np.array(rows), np.array([(i["height"], i["width"]) for i in images])


def right(rows, sizes):
    return rows


def exchanged(rows, sizes):
    return rows[:, [0, 2, 1, 4, 3, 5, 6]]


def width_and_height(rows, sizes):
    rows = exchanged(rows, sizes)
    rows[:, 3:5] -= rows[:, 1:3]
    return rows


def centre(rows, sizes):
    rows = width_and_height(rows, sizes)
    rows[:, 1:3] += rows[:, 3:5] / 2
    return rows


def pixels(rows, sizes):
    rows = rows.copy()
    rows[:, 1:5] *= np.tile(sizes, 2)[rows[:, 0].astype(int)]
    return rows


def from_zero(rows, sizes):
    rows = rows.copy()
    rows[:, 6] -= 1
    return rows


def percent(rows, sizes):
    rows = rows.copy()
    rows[:, 5] *= 100
    return rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (right, None),
        (exchanged, "if boxes are xmin, ymin, xmax, ymax in fractions"),
        (width_and_height, "if boxes are xmin, ymin, width, height in fractions"),
        (centre, "if boxes are the centre's x, y, width, height in fractions"),
        (pixels, "if boxes are ymin, xmin, ymax, xmax in pixels"),
        (from_zero, "if labels are counted from 0"),
        (percent, "48 rows have a score outside 0..1"),
    ],
)
def test_readings(scene, change, said):
    place, rows, sizes = scene
    changed = change(rows, sizes)
    records = [
        {
            "seq_id": sample,
            "qsl_idx": sample,
            "data": b"".join(
                struct.pack("<7f", *row) for row in changed[changed[:, 0] == sample]
            ).hex(),
        }
        for sample in range(len(sizes))
    ]
    (place / "log.json").write_text(json.dumps(records))
    found = evaluate(place / "log.json", place / "a.json").warnings
    if said is None:
        assert found == ()
    else:
        assert any(said in warning for warning in found), found

"""The weighted AP against pycocotools on images that are there several times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.bootstrap import average_precision, draws, interval, matches
from engine.data.coco import coco_evaluation
from engine.errors import EngineError

CATEGORIES = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]


def made(seed, count=6):
    """Ground truth of images of 100x100, and detections near it: content and rows."""
    random = np.random.default_rng(seed)
    images = [
        {"id": 10 * i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(count)
    ]
    annotations, rows = [], []
    for slot, image in enumerate(images):
        for _ in range(random.integers(0, 4)):
            x, y, w, h = *random.uniform(0, 60, 2), *random.uniform(5, 40, 2)
            label = int(random.integers(1, 3))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": CATEGORIES[label - 1]["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(random.uniform() < 0.1),
                }
            )
            for _ in range(random.integers(0, 3)):
                box = np.array([y, x, y + h, x + w]) + random.normal(0, 3, 4)
                rows.append([slot, *box / 100, random.uniform(), label])
    rows.append([0, 0, 0, 0.5, 0.5, 0.01, 1])
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, rows


def repeated(content, rows, weights):
    """Every image as often as its weight, under ids of its own."""
    images, annotations, found = [], [], []
    for slot, image in enumerate(content["images"]):
        for _ in range(weights[slot]):
            new = {**image, "id": len(images) + 1}
            for one in content["annotations"]:
                if one["image_id"] == image["id"]:
                    number = len(annotations) + 1
                    annotations.append({**one, "id": number, "image_id": new["id"]})
            found += [[len(images), *row[1:]] for row in rows if row[0] == slot]
            images.append(new)
    return {**content, "images": images, "annotations": annotations}, found


@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_weights_are_images_that_are_there_so_often(seed, weights) -> None:
    content, rows = made(seed)
    one = coco_evaluation(content, content["images"], np.float32(rows))
    ours = average_precision(matches(one), np.array(weights), one.params.recThrs)
    other, again = repeated(content, rows, weights)
    if not any(not a["iscrowd"] for a in other["annotations"]):
        assert np.isnan(ours)
        return
    theirs = coco_evaluation(other, other["images"], np.float32(again).reshape(-1, 7))
    assert ours == pytest.approx(theirs.stats[0], abs=1e-9)


def test_an_interval_is_that_of_the_ratio() -> None:
    content, rows = made(1, count=60)
    found = coco_evaluation(content, content["images"], np.float32(rows))
    whole = draws(found, samples=200)
    assert vars(interval(whole, whole)) == {"ratio": 1, "low": 1, "high": 1}
    half = coco_evaluation(content, content["images"], np.float32(rows[::2]))
    one = interval(whole, draws(half, samples=200))
    assert one.ratio == pytest.approx(half.stats[0] / found.stats[0], abs=1e-9)
    assert one.low < one.ratio < one.high < 1
    assert np.array_equal(whole, draws(found, samples=200))
    assert not np.array_equal(whole, draws(found, samples=200, seed=1))


def test_nothing_found_is_nothing_to_compare() -> None:
    content, rows = made(2)
    found = coco_evaluation(content, content["images"], np.float32(rows[-1:]))
    with pytest.raises(EngineError, match="finds none of the objects"):
        draws(found)

"""What was missed and what is false, against matching that is written out; AP, against mAP."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harness.results.accuracy import evaluation_of
from harness.results.pictures import SCORE_THRESHOLD
from harness.results.review import review_classes, review_images

SIDE = 100
CLASSES = {7: "cat", 3: "dog", 12: "no such animal"}  # label 1 is 7, label 2 is 3
IDS = list(CLASSES)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(area) - width * height)


def errors(truths, found):
    """By hand: the best score first takes the nearest object of its class that is left."""
    left, false, right = list(truths), [], []
    for label, box, score in sorted(found, key=lambda one: -one[2]):
        if score < SCORE_THRESHOLD:
            continue
        near = [one for one in left if one[0] == label and iou(one[1], box) >= 0.5]
        if near:
            left.remove(max(near, key=lambda one: iou(one[1], box)))
        (right if near else false).append((label, box))
    return left, false, right


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Twelve images of objects; detections of them, moved, of other classes, twice, of nothing."""
    folder = tmp_path_factory.mktemp("case")
    random = np.random.default_rng(3)
    images, annotations, log, cases = [], [], [], []
    for number in range(12):
        truths, found = [], []
        for _ in range(random.integers(0, 5)):
            x, y = random.uniform(0, 60, 2)
            w, h = random.uniform(15, 40, 2)
            label = int(random.integers(1, 3))
            truths.append((label, (x, y, x + w, y + h)))
            for _ in range(random.integers(0, 3)):
                moved = np.array([x, y, x + w, y + h]) + random.uniform(-6, 6, 4)
                other = int(random.integers(1, 3)) if random.random() < 0.3 else label
                found.append((other, tuple(moved), round(float(random.random()), 3)))
        images.append(
            {"id": 50 - number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE}
        )
        for label, (x0, y0, x1, y1) in truths:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 50 - number,
                    "category_id": IDS[label - 1],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
        found_too = (3, (10.0, 10.0, 50.0, 50.0), 0.9)  # of a category that has no annotation
        rows = [
            (number, b[1] / SIDE, b[0] / SIDE, b[3] / SIDE, b[2] / SIDE, score, label)
            for label, b, score in (*found, found_too)
        ]
        data = np.array(rows, "<f4").reshape(-1, 7).tobytes().hex()
        log.append({"seq_id": number, "qsl_idx": number, "data": data})
        cases.append((truths, found))
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    (folder / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (folder / "log.json").write_text(json.dumps(log))
    files = [image["file_name"] for image in images]
    return evaluation_of(folder / "log.json", folder / "truth.json", files), cases


def boxes(entries):
    return sorted((text.split()[0], *np.round(np.array(box), 3)) for text, box in entries)


def expected(entries):
    names = ("cat", "dog")
    return sorted((names[label - 1], *np.round(np.array(box) / SIDE, 3)) for label, box in entries)


def test_images(case):
    """What is of a category without annotations, which no AP counts, is not false."""
    evaluation, cases = case
    reviews = review_images(evaluation)
    assert [review.file for review in reviews] == [f"{number}.png" for number in range(12)]
    seen = np.zeros(3, int)
    for review, (truths, found) in zip(reviews, cases, strict=True):
        missed, false, right = errors(truths, found)
        for ours, theirs in ((review.missed, missed), (review.false, false), (review.right, right)):
            assert [one[0] for one in boxes(ours)] == [one[0] for one in expected(theirs)]
            for a, b in zip(boxes(ours), expected(theirs), strict=True):
                assert a[1:] == pytest.approx(b[1:], abs=2e-3)
        assert review.errors == len(missed) + len(false)
        seen += (len(missed), len(false), len(right))
    assert (seen >= 3).all()


def test_classes(case):
    """Their means are COCO's figures; a class without objects is not among them."""
    evaluation, cases = case
    classes = review_classes(evaluation)
    assert [one.name for one in classes] == ["dog", "cat"]  # by their ids
    labels = [label for truths, _ in cases for label, _ in truths]
    assert [one.truths for one in classes] == [labels.count(2), labels.count(1)]
    assert np.mean([one.ap for one in classes]) == pytest.approx(evaluation.coco.stats[0])
    assert np.mean([one.ap50 for one in classes]) == pytest.approx(evaluation.coco.stats[1])
    for one in classes:
        assert np.mean(one.precision) == pytest.approx(one.ap50, abs=1e-4)
        assert list(one.precision) == sorted(one.precision, reverse=True)

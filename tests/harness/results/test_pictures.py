"""Pictures show what they are given, where it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from harness.errors import HarnessError
from harness.results.pictures import draw_detections

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six grey images, larger than the enlarging goes, of different shapes."""
    folder = tmp_path_factory.mktemp("pictures") / "images"
    folder.mkdir()
    for number in range(6):
        image = np.full((800 + 100 * number, 1000, 3), 128, np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


FILES = [f"{number}.png" for number in range(6)]


def draw(image_dir: Path, rows: list[tuple[float, ...]], limit: int = 6, **options: Path) -> list:
    """Draw rows; return the montage and the pictures as arrays of int."""
    detections = np.array(rows, np.float32).reshape(-1, 7)
    paths = draw_detections(
        image_dir, FILES, detections, NAMES, image_dir.parent / "out", limit=limit, **options
    )
    assert sorted(paths) == sorted((image_dir.parent / "out").iterdir())
    return [cv2.imread(str(path)).astype(int) for path in paths]


@pytest.fixture(scope="module")
def plain(image_dir: Path) -> list:
    """The montage and the pictures without a box."""
    return draw(image_dir, [])


def changed(picture: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Mask of drawn pixels, without what JPEG adds around them."""
    return np.abs(picture - plain).max(axis=2) > 40


@pytest.mark.slow
def test_boxes_are_drawn_on_their_image_at_their_place(image_dir: Path, plain: list) -> None:
    # two boxes on image 2, which is 1000 high: one clear of the other
    drawn = draw(image_dir, [(2, 0.2, 0.1, 0.5, 0.4, 0.9, 1), (2, 0.6, 0.5, 0.9, 0.95, 0.4, 2)])
    for number in (0, 1, 3, 4, 5):
        assert not changed(drawn[1 + number], plain[1 + number]).any()
    mask = changed(drawn[3], plain[3])
    for top, left, bottom, right in ((200, 100, 500, 400), (600, 500, 900, 950)):
        for y in (top, bottom):
            assert mask[y - 1 : y + 2, left:right].all(axis=1).any()
        for x in (left, right):
            assert mask[top:bottom, x - 1 : x + 2].all(axis=0).any()
        assert not mask[top + 40 : bottom - 40, left + 20 : right - 20].any()
        assert mask[top - 30 : top - 5, left + 2 : left + 40].mean() > 0.5  # the label
        mask[top - 35 : bottom + 10, left - 10 : right + 10] = False
    assert not mask.any()
    assert changed(drawn[0], plain[0]).any()  # the montage shows it too


def test_labels_have_colours_of_their_own(image_dir: Path) -> None:
    tops = (0.1, 1), (0.4, 1), (0.7, 2)
    drawn = draw(image_dir, [(0, top, 0.1, top + 0.2, 0.8, 0.9, label) for top, label in tops])
    first, same, other = (drawn[1][int(800 * top) + 80, 100] for top, _ in tops)
    np.testing.assert_allclose(first, same, atol=25)
    assert np.abs(other - first).max() > 80


def test_low_scores_are_not_drawn(image_dir: Path, plain: list) -> None:
    drawn = draw(
        image_dir, [(n, 0.2, 0.1, 0.5, 0.4, score, 1) for n, score in ((1, 0.29), (2, 0.31))]
    )
    assert not changed(drawn[2], plain[2]).any()
    assert changed(drawn[3], plain[3]).any()


def test_boxes_beyond_the_edge_stay_in_the_picture(image_dir: Path, plain: list) -> None:
    drawn = draw(image_dir, [(0, -0.4, -0.3, 1.7, 1.2, 0.9, 1), (5, 0.5, 0.5, 0.5, 0.5, 0.9, 2)])
    mask = changed(drawn[1], plain[1])
    assert mask[:, 0].mean() > 0.9
    assert mask[0].mean() > 0.9
    assert changed(drawn[6], plain[6]).any()


def test_annotations_are_dashed(image_dir: Path, plain: list) -> None:
    annotation = {"id": 1, "image_id": 8, "category_id": 4, "area": 1, "iscrowd": 0}
    content = {
        "images": [{"id": 8, "file_name": "3.png", "height": 1100, "width": 1000}],
        "annotations": [annotation | {"bbox": [100, 200, 600, 700]}],
        "categories": [{"id": 4, "name": "cat"}],
    }
    path = image_dir.parent / "instances.json"
    path.write_text(json.dumps(content))
    mask = changed(draw(image_dir, [], annotations=path)[4], plain[4])
    for edge in (mask[200, 100:700], mask[900, 100:700], mask[200:900, 100], mask[200:900, 700]):
        assert 0.3 < edge.mean() < 0.95
    assert not mask[220:880, 120:680].any()


def test_the_images_are_spread_and_limited(image_dir: Path) -> None:
    out = image_dir.parent / "out"
    paths = draw_detections(image_dir, FILES, np.empty((0, 7), np.float32), NAMES, out, limit=3)
    assert [path.name for path in paths] == [
        "montage.jpg",
        "00000_0.jpg",
        "00002_2.jpg",
        "00005_5.jpg",
    ]
    with pytest.raises(HarnessError, match="at least 1"):
        draw_detections(image_dir, FILES, np.empty((0, 7), np.float32), NAMES, out, limit=0)


def test_faults(image_dir: Path, tmp_path: Path) -> None:
    image_dir = Path(shutil.copytree(image_dir, tmp_path / "images"))
    with pytest.raises(HarnessError, match="label 3 has no name; there are 2"):
        draw(image_dir, [(0, 0.2, 0.1, 0.5, 0.4, 0.9, 3)])
    (image_dir / "4.png").write_bytes((image_dir / "4.png").read_bytes()[:100])
    with pytest.raises(HarnessError, match=r"4\.png: truncated PNG"):
        draw(image_dir, [])
    (image_dir / "4.png").unlink()
    with pytest.raises(HarnessError, match=r"4\.png: missing"):
        draw(image_dir, [])

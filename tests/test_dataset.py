"""Map files, known data sets and the checks on annotation files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.coco import load_annotations
from engine.protocol import EngineError
from harness.dataset import category_names, known_dataset, load_map
from harness.errors import HarnessError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("split", ["val", "cal"])
def test_shipped_coco_maps_are_the_benchmarks(golden: Path, split: str) -> None:
    dataset = known_dataset("coco", split, Path("build"))
    expected = (golden / f"{split}_map.txt").read_text().split()
    assert list(load_map(ROOT / dataset.map_file)) == expected


def test_known_datasets() -> None:
    coco = known_dataset("coco", "val", Path("elsewhere"))
    assert coco.image_dir == Path("elsewhere/data/coco/val2017")
    assert coco.annotations == Path("elsewhere/data/coco/annotations/instances_val2017.json")
    calibration = known_dataset("coco", "cal", Path("build"))
    assert calibration.image_dir == Path("build/data/coco/train2017")
    assert calibration.annotations is None
    assert known_dataset("demo", "val", Path("build")).image_dir == Path("demo/data/val")
    with pytest.raises(HarnessError, match="imagenet"):
        known_dataset("imagenet", "val", Path("build"))
    with pytest.raises(HarnessError, match="test"):
        known_dataset("coco", "test", Path("build"))


def test_map_order_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("b.jpg\r\na.jpg\nc d.png")
    assert load_map(path) == ("b.jpg", "a.jpg", "c d.png")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"a.jpg\n\nb.jpg\n", "line 2: blank"),
        (b"a.jpg\nb.jpg\na.jpg\n", r"line 3: 'a.jpg' stands in line 1"),
        (b"a.jpg\n../b.jpg\n", "line 2: '../b.jpg' is a path"),
        (b"a.jpg\nval\\b.jpg\n", "line 2: .* is a path"),
        (b"..\n", "line 1"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_maps(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "map.txt"
    path.write_bytes(content)
    with pytest.raises(HarnessError, match=problem) as caught:
        load_map(path)
    assert str(path) in str(caught.value)


def test_missing_map(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"map\.txt not found"):
        load_map(tmp_path / "map.txt")


GOOD = {
    "images": [{"id": 5, "file_name": "a.jpg", "height": 3, "width": 4}],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0}
    ],
    "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
}


def test_category_names_are_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD))
    assert category_names(path) == ("cat", "dog")
    assert load_annotations(path) == GOOD


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"images": None}, "no list 'images'"),
        ({"categories": [{"id": 9}]}, r"categories\[0\] lacks name"),
        ({"annotations": [{"id": 1}]}, r"annotations\[0\] lacks image_id, category_id, bbox"),
        ({"annotations": GOOD["annotations"] * 2}, "id 1 occurs more than once"),
        ({"images": [GOOD["images"][0] | {"id": 6}]}, "annotation 1 names"),
        ({"categories": GOOD["categories"][1:]}, "annotation 1 names"),
    ],
)
def test_bad_annotations(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(EngineError, match=problem):
        load_annotations(path)


def test_unreadable_annotations(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not found"):
        load_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(GOOD)[:-3])
    with pytest.raises(EngineError, match="no valid JSON"):
        load_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(EngineError, match="no list 'images'"):
        load_annotations(tmp_path / "a.json")

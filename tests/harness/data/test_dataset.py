"""Map files, known data sets and the checks on annotation files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.coco import coco_stats, load_annotations
from engine.errors import EngineError
from harness.data.dataset import Dataset, category_names, check_annotated, known_dataset, load_map
from harness.errors import HarnessError
from tests.support import ROOT


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
    with pytest.raises(HarnessError, match="test"):
        known_dataset("coco", "test", Path("build"))


def test_a_data_set_is_a_folder_of_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet", "", ".", "..", "maps/../demo"):
        with pytest.raises(
            HarnessError, match=f"unknown data set '{name}'.* there are: coco, demo, openimages$"
        ):
            known_dataset(name, "val", Path("build"))
    (tmp_path / "data_maps" / "traffic").mkdir(parents=True)
    (tmp_path / "data_maps" / "README.md").touch()
    with pytest.raises(HarnessError, match=r"there are: coco, demo, openimages, traffic$"):
        known_dataset("README.md", "val", Path("build"))
    new = known_dataset("traffic", "val", Path("build"))
    assert new.name == "traffic-val"
    assert new.map_file == Path("data_maps/traffic/val_map.txt")
    assert new.image_dir == Path("build/data/traffic/val")
    assert new.annotations == Path("build/data/traffic/annotations/instances_val.json")
    # the shipped maps, and those of this folder before them
    for split in ("val", "cal"):
        shipped = known_dataset("demo", split, Path("build")).map_file
        assert load_map(shipped) == load_map(ROOT / "data_maps" / "demo" / f"{split}_map.txt")
    (tmp_path / "data_maps" / "demo").mkdir()
    (tmp_path / "data_maps" / "demo" / "val_map.txt").write_text("mine.jpg\n")
    assert load_map(known_dataset("demo", "val", Path("build")).map_file) == ("mine.jpg",)
    assert known_dataset("traffic", "cal", Path("build")).image_dir == Path(
        "build/data/traffic/cal"
    )


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
        (b"a.jpg\n../b.jpg\n", "line 2: '../b.jpg' is no name of an image"),
        (b"a.jpg\nval/../../b.jpg\n", "line 2: .* is no name of an image"),
        (b"/etc/passwd\n", "line 1: '/etc/passwd' is no name of an image"),
        (b"a//b.jpg\n", "line 1: .* is no name of an image"),
        (b"a\x1b[2Jb.jpg\n", r"line 1: 'a\\x1b\[2Jb.jpg' is no name"),
        (b"a.jpg\nval\\b.jpg\n", "line 2: .* is a path of Windows"),
        (b"c:b.jpg\n", "line 1: .* is a path of Windows"),
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


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n", ("a.jpg", "b.jpg")),
        ("a\u2028b.jpg\nc.jpg".encode(), ("a\u2028b.jpg", "c.jpg")),
        ("a\u3000b.jpg\n".encode(), ("a\u3000b.jpg",)),
        (b"north/1.jpg\nsouth/1.jpg\n", ("north/1.jpg", "south/1.jpg")),
    ],
)
def test_names_in_maps(tmp_path: Path, content: bytes, names: tuple[str, ...]) -> None:
    path = tmp_path / "map.txt"
    path.write_bytes(content)
    assert load_map(path) == names


def test_missing_map(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"map\.txt not found"):
        load_map(tmp_path / "map.txt")


IMAGE = {"id": 5, "file_name": "a.jpg", "height": 3, "width": 4}
BOX = {"id": 1, "image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0}
GOOD = {
    "images": [IMAGE],
    "annotations": [BOX],
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
        ({"images": [IMAGE | {"id": 6}]}, "1 annotations have a image_id .* first is 5 of annot"),
        (
            {"categories": GOOD["categories"][1:]},
            "a category_id .*'categories'.* 9 of annot",
        ),
        ({"images": [IMAGE | {"height": 0}]}, r"images\[0\]: height is 0, not a positive number"),
        ({"images": [IMAGE | {"width": "640"}]}, "width is '640', not a positive number of pixels"),
        ({"images": [IMAGE | {"file_name": 7}]}, "file_name is 7, not text"),
        ({"images": [IMAGE | {"id": [5]}]}, r"id is \[5\], not a whole number"),
        ({"images": "a.jpg"}, "no list 'images'"),
        ({"annotations": [BOX | {"bbox": [0, 0, 1]}]}, "bbox is .* not four numbers"),
        ({"annotations": [BOX | {"bbox": [0, 0, 1, float("nan")]}]}, "NaN is no number"),
        ({"annotations": [BOX | {"bbox": {"x": 0}}]}, "bbox is .* not four numbers"),
        ({"annotations": [BOX | {"area": None}]}, "area is None, not a number"),
        ({"annotations": [BOX | {"category_id": "cat"}]}, "category_id is 'cat', not a whole num"),
    ],
)
def test_bad_annotations(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(EngineError, match=problem):
        load_annotations(path)


TEXT_IDS = {
    "images": [IMAGE | {"id": one, "file_name": f"{one}.jpg"} for one in ("street-1", "yard")],
    "annotations": [BOX | {"image_id": "yard", "category_id": "c1"}],
    "categories": [{"id": "c1", "name": "cat"}, {"id": "c2", "name": "dog"}],
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"annotations": [BOX | {"image_id": "street_1", "category_id": "c1"}]},
            r"1 annotations have a image_id that 'images' does not hold, the first is 'street_1' "
            r"of annotations\[0\]; the nearest id there is 'street-1'$",
        ),
        (
            {"annotations": [*TEXT_IDS["annotations"], BOX | {"image_id": "yard"}]},
            r"1 annotations have a category_id .*, the first is 9 of annotations\[1\]; ids there",
        ),
        # 1 would be the number of the first image, and pass
        ({"annotations": [BOX | {"image_id": 1, "category_id": "c1"}]}, "the first is 1 of annot"),
        ({"images": TEXT_IDS["images"] * 2}, "id 'street-1' occurs more than once in 'images'"),
        (
            {"images": [*TEXT_IDS["images"], IMAGE]},
            r"images\[0\]: id is 'street-1', not a whole number, as ids are unless all of a list",
        ),
    ],
)
def test_text_ids_that_are_wrong(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TEXT_IDS))
    assert load_annotations(path)["annotations"][0]["image_id"] == 2
    path.write_text(json.dumps(TEXT_IDS | change))
    with pytest.raises(EngineError, match=problem):
        load_annotations(path)


def test_unreadable_annotations(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not found"):
        load_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(GOOD)[:-3])
    with pytest.raises(EngineError, match="not JSON"):
        load_annotations(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1], "score": 0.5}], "holds a list"),
        ("text", "holds one value"),
        (None, "holds one value"),
        ({"version": "5.0.1", "flags": {}, "shapes": []}, "no list 'images'"),  # LabelMe
        ({"info": {}, "images": [], "licenses": []}, "no list 'annotations'"),  # image_info_test
    ],
)
def test_json_that_is_no_coco_instances_file(tmp_path: Path, content: object, problem: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(EngineError, match=rf"a\.json is no COCO instances file: it .*{problem}"):
        load_annotations(tmp_path / "a.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(["images", "annotations", "categories"]), st.data())
def test_any_value_in_any_place_is_read_or_refused(section: str, data: st.DataObject) -> None:
    """What passes the check is COCO to pycocotools, too."""
    content = json.loads(json.dumps(GOOD))
    entry = data.draw(st.sampled_from(content[section]))
    entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(JSON)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(content))
        try:
            read = load_annotations(path)
        except EngineError as error:
            assert "\n" not in str(error)
            return
    rows = np.array([[0, 0, 0, 1, 1, 0.5, 1]], np.float32)
    assert -1 <= coco_stats(read, read["images"], rows)["AP"] <= 1


def test_a_map_and_its_annotations_belong_together(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("a.jpg\nb.jpg\n")
    annotations = tmp_path / "a.json"
    dataset = Dataset("new-val", tmp_path, tmp_path / "map.txt", annotations)
    check_annotated(dataset)  # without annotations there is nothing to compare
    annotations.write_text(json.dumps(GOOD))
    with pytest.raises(HarnessError, match=r"lacks 1 images of .*map\.txt, the first is b\.jpg"):
        check_annotated(dataset)
    (tmp_path / "map.txt").write_text("a.jpg\n")
    check_annotated(dataset)

"""A data set of one's own: `harness dataset add`, and what the other commands then find."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from engine.errors import EngineError
from harness.cli.main import app
from harness.data.dataset import known_dataset, load_map
from harness.data.own import add_dataset
from harness.errors import HarnessError
from tests.support.grey import grey_detector

NAMES = ("north/1.jpg", "south/1.jpg", "b c.png")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Pictures in sub-folders, and annotations whose ids are texts, outside any checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BUILD_DIR", raising=False)
    rng = np.random.default_rng(0)
    for folder, names in (("mine", (*NAMES, "more.jpg")), ("others", ("z.jpg", "y/x.jpg"))):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 255, (30, 40, 3), np.uint8))
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    write(tmp_path)
    return tmp_path


def write(place, names=NAMES, **more):
    content = {
        "images": [{"id": n, "file_name": n, "width": 40, "height": 30} for n in names],
        "annotations": [
            {
                "id": number,
                "image_id": name,
                "category_id": 5,
                "bbox": [1, 2, 10, 10],
                "area": 100,
                "iscrowd": 0,
            }
            for number, name in enumerate(names, 1)
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 5, "name": "dog"}],
    } | more
    (place / "a.json").write_text(json.dumps(content))


def add(*arguments):
    given = ["traffic", "--images", "mine", "--annotations", "a.json", *arguments]
    return CliRunner().invoke(app, ["dataset", "add", *given])


def test_a_category_of_crowds_alone_has_no_ap_and_that_is_said(place):
    """Their AP is what COCOeval says of the file: -1 for the crowds, which no mAP counts."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    box = {"bbox": [1, 2, 10, 10], "area": 100, "image_id": 1}
    images = [{"id": 1, "file_name": NAMES[0], "width": 40, "height": 30}]
    boxes = [{"id": n, "category_id": n, "iscrowd": n - 1, **box} for n in (1, 2)]
    kinds = [{"id": 1, "name": "cat"}, {"id": 2, "name": "herd"}]
    write(place, images=images, annotations=boxes, categories=kinds)
    known = COCO("a.json")
    found = known.loadRes([{**one, "score": 1.0} for one in boxes])
    evaluation = COCOeval(known, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, 2]
    assert (precision[:, 1] == -1).all() and (precision[:, 0] > 0.9).all()
    said = add().output
    assert "1 categories have crowds alone (iscrowd), as 'herd': they have no AP" in said
    assert "have no object" not in said


def test_maps_and_links_are_written_and_all_is_said(place):
    done = add("--calibration-images", "others")
    assert done.exit_code == 0, done.exception
    assert "traffic: 3 images, 40x30 to 40x30, 3 objects in 2 categories; 2 calib" in done.output
    assert "category 1: cat, 0 objects\n  category 2: dog, 3 objects" in done.output
    assert "1 categories have no object, as 'cat'" in done.output
    assert "iscrowd" not in done.output
    assert "1 images in mine are not in a.json and are left out" in done.output
    assert (
        'make run WEIGHTS=FILE RUN_ARGS="--dataset traffic --test_mode=AccuracyOnly"' in done.output
    )
    val, cal = (known_dataset("traffic", split, place / "build") for split in ("val", "cal"))
    assert load_map(val.map_file) == NAMES
    assert load_map(cal.map_file) == ("y/x.jpg", "z.jpg")
    assert val.image_dir.samefile("mine")
    assert cal.image_dir.samefile("others")
    assert val.annotations.samefile("a.json")


def test_preprocess_and_accuracy_take_it(place):
    assert add().exit_code == 0
    runner = CliRunner()
    done = runner.invoke(app, ["preprocess", "--dataset", "traffic", "--val_only"])
    assert done.exit_code == 0, done.exception
    folder = place / "build/preprocessed_data/traffic-val/float32_1200x1200"
    assert all((folder / f"{name}.npy").is_file() for name in NAMES)
    row = np.array([[0, 2 / 30, 1 / 40, 12 / 30, 11 / 40, 0.9, 2]], "<f4")
    log = [{"seq_id": n, "qsl_idx": n, "data": row.tobytes().hex()} for n in range(3)]
    (place / "log.json").write_text(json.dumps(log))
    done = runner.invoke(app, ["accuracy", "log.json", "--dataset", "traffic"])
    assert "mAP=100.000%" in done.output


def test_without_calibration_images(place):
    add("--calibration-images", "others")
    done = add("--force")
    assert "no images for calibration, which INT8 needs" in done.output
    with pytest.raises(HarnessError, match="not found"):
        load_map(known_dataset("traffic", "cal", place / "build").map_file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: write(place, ["../secret.jpg"]), "is no name of an image"),
        (lambda place: write(place, ["/etc/passwd"]), "is no name of an image"),
        (lambda place: write(place, [*NAMES, "gone.jpg"]), r"1 of 4 images .*gone.jpg \(missing"),
        (
            lambda place: (place / "mine/b c.png").write_bytes(b"x"),
            r"1 of 3 images .*b c.png \(can",
        ),
        (lambda place: os.mkfifo(place / "mine/f.jpg") or write(place, ["f.jpg"]), "no file"),
        (lambda place: write(place, []), "a.json: no images"),
        (lambda place: (place / "data_maps/traffic").mkdir(parents=True), "exists already"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(place, spoil, message):
    spoil(place)
    with pytest.raises((HarnessError, EngineError), match=message):
        add_dataset("traffic", place / "mine", place / "a.json", None, place / "b", force=False)
    assert not list(place.rglob("*_map.txt"))
    assert not (place / "b").exists()


def test_without_calibration_images_nothing_is_made_for_int8(place, monkeypatch):
    """The command that is named brings them, and keeps images and annotations."""
    assert add().exit_code == 0
    monkeypatch.setattr("harness.make.route._command", lambda *_: pytest.fail("something is made"))
    (place / "my.pth").touch()
    lines = []
    for target in ("run", "calibrate", "preprocess_data", "generate_engines"):
        options = ["--dataset", "traffic", "--weights", "my.pth"]
        done = CliRunner().invoke(app, ["make", target, *options])
        lines.append(str(done.exception))
    lines.append(str(CliRunner().invoke(app, ["preprocess", "--dataset", "traffic"]).exception))
    assert not (place / "build/preprocessed_data").exists()
    (said,) = set(lines)
    assert said.startswith("data set traffic has no calibration images, which INT8 needs")
    command = said.partition("`")[2].partition("`")[0].replace("DIR", "others")
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.exception
    assert "traffic: 3 images" in done.output
    assert "2 calibration images" in done.output


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_images_are_missed_before_the_work_with_the_data_set_and_its_remedy(place, folder):
    assert add("--calibration-images", "others").exit_code == 0
    for split in ("val", "cal"):
        data = place / "build/data/traffic" / split
        data.unlink()
        if folder == "empty":
            data.mkdir()
        done = CliRunner().invoke(app, ["preprocess", "--dataset", "traffic"])
        assert "of the data set traffic " in str(done.exception)
        assert "`harness dataset add traffic" in str(done.exception)
        assert not (place / "build/preprocessed_data").exists()
        if folder == "empty":
            data.rmdir()
        data.symlink_to(place / ("mine" if split == "val" else "others"))


@pytest.mark.parametrize("command", ["preprocess", "run"])
def test_the_data_set_that_is_taken_without_a_name_is_said(place, command):
    assert add().exit_code == 0
    grey_detector(place / "grey.onnx")
    done = CliRunner().invoke(app, [command, "grey.onnx"])
    assert str(done.exception).endswith(
        "; coco is what is taken without --dataset NAME, others are: demo, openimages, traffic"
    )
    done = CliRunner().invoke(app, [command, "grey.onnx", "--dataset", "traffic"])
    assert "without --dataset" not in str(done.exception)


@pytest.mark.parametrize(
    ("images", "names", "message"),
    [
        (".", NAMES[:2], "2 of them .* north/1.jpg as mine/north/1.jpg: .* take mine as the image"),
        (
            "mine",
            ["1.jpg", "x/b c.png"],
            "2 of them .*, x/b c.png as b c.png: .* write their folders",
        ),
        ("mine", ["gone.jpg"], r"missing\)$"),
    ],
)
def test_images_in_other_folders_are_found(place, images, names, message):
    """By both commands that look for them."""
    write(place, names)
    with pytest.raises(HarnessError, match=message):
        add_dataset("traffic", Path(images), place / "a.json", None, place / "b", force=False)
    (place / "data_maps/traffic").mkdir(parents=True)
    (place / "data_maps/traffic/val_map.txt").write_text("".join(f"{one}\n" for one in names))
    (place / "build/data/traffic").mkdir(parents=True)
    (place / "build/data/traffic/val").symlink_to(place / images)
    done = CliRunner().invoke(app, ["preprocess", "--dataset", "traffic", "--val_only"])
    said = re.sub(r"build/data/traffic/val/?(?=mine)", "", str(done.exception))
    if "gone" not in names[0]:
        assert re.search(message, said)
    assert ("found elsewhere" in said) == ("gone" not in names[0])


@pytest.mark.parametrize("name", ["coco", "demo", "../x", "a/b", "", ".", "-x"])
def test_names_that_do_not_do(place, name):
    with pytest.raises(HarnessError, match="cannot be the name of a data set"):
        add_dataset(name, place / "mine", place / "a.json", None, place / "b", force=True)


def test_files_under_a_link_s_name_are_not_removed(place):
    (place / "build/data/traffic/val").mkdir(parents=True)
    with pytest.raises(HarnessError, match="is no link to your files; move it away"):
        add_dataset("traffic", place / "mine", place / "a.json", None, place / "build", force=True)

"""`harness dataset add --model`: categories in the model's order, matched by their names."""

from __future__ import annotations

import json
import re
import shlex

import onnx
import pytest
from typer.testing import CliRunner

from engine.data.coco import load_annotations
from harness.cli.main import app
from harness.data.dataset import known_dataset
from harness.data.oddities import check_classes
from harness.data.ordering import in_order_of
from harness.errors import HarnessError
from tests.support.graphs import UNCAPPED, detector
from tests.support.grey import BOX, GREYS, grey_dataset, grey_detector

NAMES = ("ash", "birch", "cedar", "dog rose", "elm", "fir", "grass")
"""Label L of the detector of greys is the L-th: an image of grey 10 L shows one."""

OWN = {300: "Elm", 7: "birch", 20: "dog-rose", 4: "ash"}
"""Categories of the user: ids and names, in an order of their own; greys 30 and 60 are none."""


def named(path, names=NAMES):
    grey_detector(path)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"class_names": json.dumps(names)})
    onnx.save(model, path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The detector of greys with names, its images, and annotations of some of its classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BUILD_DIR", raising=False)
    named(tmp_path / "grey.onnx")
    grey_dataset(tmp_path / "mine", tmp_path / "all.json")
    content = json.loads((tmp_path / "all.json").read_text())
    ids = {10: 4, 20: 7, 40: 20, 50: 300}  # of the user, by grey
    content["categories"] = [{"id": n, "name": one, "mine": n} for n, one in OWN.items()]
    # what is found in one of the others is a false detection
    content["annotations"] = [
        {**one, "category_id": ids[grey], "segmentation": [[1, 2.5]]}
        for grey, one in zip(GREYS, content["annotations"], strict=True)
        if grey in ids
    ]
    # an object that is missed, and one of another class than is found
    first = content["annotations"][0]
    content["annotations"] += [
        {**first, "id": 50, "category_id": 300},
        {**first, "id": 51, "image_id": 998, "bbox": [0, 0, 2, 2], "area": 4},
    ]
    (tmp_path / "own.json").write_text(json.dumps(content))
    return tmp_path


def add(*arguments):
    given = ["trees", "--images", "mine", "--annotations", "own.json", *arguments]
    return CliRunner().invoke(app, ["dataset", "add", *given])


def run(*arguments):
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def by_hand(content):
    """Write the annotations as somebody does who knows the order of the classes."""
    ids = {"ash": 4, "birch": 7, "dog rose": 20, "elm": 300}
    free = list(range(1000, 1010))
    return {
        **content,
        "categories": [{"id": ids.get(one) or free.pop(), "name": one} for one in NAMES],
    }


def test_the_map_is_that_of_annotations_ordered_by_hand(place):
    """From the model's detections, by LoadGen and pycocotools; the user's file stays."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    before = (place / "own.json").read_bytes()
    done = add("--model", "grey.onnx")
    assert done.exit_code == 0, done.exception
    (ready,) = re.findall(r"then (harness run .*)", done.output)
    shown = re.findall(r"category \d+: (.*), \d+ objects", done.output)
    assert len(shown) == len(json.loads(before)["categories"]) < len(NAMES)
    assert "have no object" not in done.output
    run("preprocess", "grey.onnx", "--dataset", "trees", "--val_only")
    run(*shlex.split(ready)[1:], "--log-dir", "logs")
    (path,) = (place / "logs").rglob("result.json")
    result = json.loads(path.read_text())
    assert not any("named otherwise" in one for one in result["warnings"])

    hand = by_hand(json.loads(before))
    (place / "hand.json").write_text(json.dumps(hand))
    ids = [one["id"] for one in hand["categories"]]
    top, left, bottom, right = BOX
    results = []
    for grey, image in zip(GREYS, hand["images"], strict=True):
        width, height = image["width"], image["height"]
        box = [left * width, top * height, (right - left) * width, (bottom - top) * height]
        kind = {"category_id": ids[grey // 10 - 1], "score": 0.9}
        results.append({"image_id": image["id"], "bbox": box, **kind})
    truth = COCO("hand.json")
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert result["accuracy"]["mAP"] == pytest.approx(evaluation.stats[0], abs=1e-6)
    assert 0.1 < evaluation.stats[0] < 0.95
    assert (place / "own.json").read_bytes() == before


def test_ids_stay_and_all_classes_are_listed(place):
    given = json.loads((place / "own.json").read_text())
    assert add("--model", "grey.onnx").exit_code == 0
    path = known_dataset("trees", "val", place / "build").annotations
    used = json.loads(path.read_text())
    assert {**used, "categories": 0} == {**given, "categories": 0}
    entries = {one["name"]: one for one in used["categories"]}
    assert list(entries) == ["ash", "birch", "cedar", "dog-rose", "Elm", "fir", "grass"]
    assert all(one in used["categories"] for one in given["categories"])
    assert [entries[one]["id"] for one in ("cedar", "fir", "grass")] == [1, 2, 3]
    assert not list(place.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("classes", "categories", "said"),
    [
        (NAMES, ["oak", "ash", "yew"], r"no class .* of 2 categories: 'oak', 'yew'; rename"),
        (NAMES, [f"x{n}" for n in range(12)], "of 12 categories: 'x0', .*, 'x9' and 2 more; ren"),
        (NAMES, ["ash", "elm", "ash"], "categories of the same name: 'ash'$"),
        (NAMES, ["ash", "Dog Rose", "dog rose"], "same class .*: 'Dog Rose', 'dog rose'$"),
        (("ash", "elm", "elm"), ["ash"], "grey.onnx: classes of the same name: 'elm'$"),
        (("c-", "c+"), ["c"], "no class .* 'c';"),  # which of both is not known
        (("-", "c"), ["+"], r"no class .* '\+';"),
        ((), ["ash"], "no class names, .* with --names FILE$"),
    ],
)
def test_what_cannot_be_matched_is_refused_by_name(place, classes, categories, said):
    """Before anything is written."""
    named(place / "grey.onnx", classes)
    kinds = [{"id": number, "name": name} for number, name in enumerate(categories, 1)]
    content = json.loads((place / "own.json").read_text())
    (place / "own.json").write_text(json.dumps({**content, "categories": kinds, "annotations": []}))
    done = add("--model", "grey.onnx")
    assert done.exit_code != 0
    assert re.search(said, str(done.exception))
    assert not (place / "build").exists() and not list(place.rglob("*_map.txt"))


def test_exact_names_come_before_alike_ones(place):
    named(place / "grey.onnx", ("c", "C", "c+"))
    content = {"categories": [{"id": 5, "name": "c+"}, {"id": 9, "name": "C"}]}
    found, said = in_order_of(place / "grey.onnx", content, place / "own.json")
    assert [one["id"] for one in found["categories"]] == [1, 9, 5]
    assert not said


def test_names_that_are_not_the_very_same_are_said(place):
    """Punctuation alone may tell classes apart that the model does not have."""
    assert (
        "warning: 2 categories are not named as the model's classes that they are taken for, "
        in (add("--model", "grey.onnx").output)
    )
    content = {"categories": [{"id": 1, "name": "ash"}, {"id": 2, "name": "Fir++"}]}
    _, (said,) = in_order_of(place / "grey.onnx", content, place / "own.json")
    assert said.endswith("as 'Fir++' for 'fir'")


def test_names_of_another_number_than_the_classes(place):
    from graph_surgery.replace import insert_nms

    model = insert_nms(detector(UNCAPPED)).model
    onnx.helper.set_model_props(model, {"class_names": '["ash"]'})
    onnx.save(model, place / "few.onnx")
    with pytest.raises(HarnessError, match=r"few.onnx detects \d+ classes and names 1$"):
        in_order_of(place / "few.onnx", {"categories": []}, place / "own.json")


def test_ids_that_are_texts(place):
    """They are numbered, and the references to them with them."""
    content = json.loads((place / "own.json").read_text())
    texts = {number: f"id of {name}" for number, name in OWN.items()}
    content["categories"] = [{"id": texts[n], "name": name} for n, name in OWN.items()]
    expected = []
    for one in content["annotations"]:
        expected.append(OWN[one["category_id"]])
        one["category_id"] = texts[one["category_id"]]
    (place / "own.json").write_text(json.dumps(content))
    assert add("--model", "grey.onnx").exit_code == 0
    used = load_annotations(known_dataset("trees", "val", place / "build").annotations)
    names = {one["id"]: one["name"] for one in used["categories"]}
    assert [names[one["category_id"]] for one in used["annotations"]] == expected


def test_the_refusal_of_too_few_categories_names_the_command(place, demo_surgered):
    """It keeps the calibration images, and once it has run, the model is taken."""
    content = json.loads((place / "own.json").read_text())
    for one, name in zip(content["categories"], ("truck", "person", "dog", "cat"), strict=True):
        one["name"] = name
    (place / "own.json").write_text(json.dumps(content))
    assert add("--calibration-images", "mine").exit_code == 0
    data = known_dataset("trees", "val", place / "build")
    with pytest.raises(HarnessError, match="80 classes") as refusal:
        check_classes(data, demo_surgered)
    command = str(refusal.value).partition("`")[2].partition("`")[0]
    said = run(*shlex.split(command)[1:])
    assert f"{len(GREYS)} calibration images" in said
    check_classes(data, demo_surgered)
    # and back: the file's own order, linked, and again from the copy
    assert add("--force").exit_code == 0
    assert data.annotations.samefile("own.json")
    copy = data.annotations.with_name("instances_val.by_model.json")
    for file in (data.annotations, copy):
        given = ["--images", "mine", "--annotations", str(file), "--force"]
        run("dataset", "add", "trees", *given, "--model", str(demo_surgered))
        check_classes(data, demo_surgered)
    assert json.loads((place / "own.json").read_text()) == content

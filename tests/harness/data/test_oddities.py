"""What would make a mAP wrong in silence is said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from PIL import Image

from engine.data.coco import load_annotations
from engine.protocol import InputSpec
from harness.data.dataset import known_dataset
from harness.data.oddities import (
    annotation_oddities,
    check_classes,
    class_oddities,
    oddities,
    size_oddities,
)
from harness.data.transform import preprocess_image
from harness.errors import HarnessError
from tests.support import ROOT


def box(number, bbox, **more):
    area = bbox[2] * bbox[3]
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": bbox, "area": area} | {
        "iscrowd": 0,
        **more,
    }


def content(*boxes, size=(40, 30)):
    image = {"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}
    return {
        "images": [image],
        "annotations": list(boxes),
        "categories": [{"id": 1, "name": "cat"}],
    }


GOOD = (
    box(1, [0, 0, 40, 30]),
    box(2, [3.5, 2, 4, 4], area=9),  # of a segment
    box(3, [36, 26, 4.6, 4.2]),  # rounded
)


def test_a_model_with_more_classes_than_categories_is_refused(demo_surgered, tmp_path) -> None:
    """Before it runs; one with as many is not."""
    data = known_dataset("demo", "val", tmp_path)
    check_classes(data, demo_surgered)
    known = json.loads((ROOT / "demo/data/annotations/instances_val.json").read_text())
    few = tmp_path / "few.json"
    few.write_text(json.dumps(known | {"categories": known["categories"][:79], "annotations": []}))
    refused = r"80 classes, .* 79 categories: .*`harness dataset add NAME .* --model .*` lists all"
    with pytest.raises(HarnessError, match=refused):
        check_classes(replace(data, annotations=few), demo_surgered)
    model = onnx.load(demo_surgered)
    onnx.helper.set_model_props(model, {})
    onnx.save(model, tmp_path / "nameless.onnx")
    with pytest.raises(HarnessError, match=r"79 categories: .*; list all categories of the model"):
        check_classes(replace(data, annotations=few), tmp_path / "nameless.onnx")


def test_a_guessed_image_size_is_said(demo_surgered, tmp_path) -> None:
    """On another data set than the benchmark's own, at whose size a guess is no wonder."""
    model = onnx.load(demo_surgered)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, metadata | {"image_size_guess": "400x400"})
    onnx.save(model, tmp_path / "guess.onnx")
    data = known_dataset("demo", "val", tmp_path)
    images = SimpleNamespace(manifest={"images": []})
    (said,) = oddities(data, images, tmp_path / "guess.onnx")
    assert "400x400, is a guess" in said
    assert oddities(data, images, demo_surgered) == ()
    assert oddities(replace(data, name="coco-val"), images, tmp_path / "guess.onnx") == ()


def test_usual_annotations_are_not_odd():
    assert annotation_oddities(content(*GOOD)) == []


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (box(9, [3, 4, 0, 5]), "without width or height"),
        (box(9, [3, 4, 5, -1]), "without width or height"),
        (box(9, [41, 4, 5, 5]), "outside their image"),
        (box(9, [20, 20, 38, 29]), "reaches beyond its image"),  # right, bottom
        (box(9, [0.1, 0.2, 0.3, 0.3]), "not fractions"),
        (box(9, [1, 2, 5, 5], area=0), "have no area"),
        (box(9, [1, 2, 5, 5], area=400), "an area larger than their box"),
    ],
)
def test_annotations_that_cannot_be_matched(odd, said):
    (first, *_) = annotation_oddities(content(*GOOD, odd))
    assert first.startswith("1 of 4 annotations")
    assert said in first
    assert first.endswith("the first has the id 9")


def test_annotations_of_nothing():
    (said,) = annotation_oddities(content())
    assert "mAP is undefined" in said


@pytest.mark.parametrize(("turn", "said"), [(6, "EXIF"), (1, None)])
def test_size_of_images_as_they_are_decoded(tmp_path, turn, said):
    """Pillow writes the orientation, and OpenCV applies it."""
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif.tobytes())
    spec = InputSpec("image", (3, 8, 8), "float32")
    source = preprocess_image(tmp_path / "a.jpg", spec, np.empty(spec.shape, np.float32))
    found = size_oddities(content(*GOOD), {"a.jpg": source.shape})
    if said is None:
        assert found == []
    else:
        assert "annotated 40x30, decoded 30x40" in found[0]
        assert said in found[0]


def test_another_size_of_images():
    (found,) = size_oddities(content(), {"a.jpg": (60, 80)})
    assert "annotated 40x30, decoded 80x60" in found
    assert "EXIF" not in found


@pytest.mark.parametrize(
    ("count", "names", "said"),
    [
        (2, ("cat", "dog"), None),
        (2, ("Cat", "DOG"), None),
        (2, (), None),
        (None, (), None),
        (3, (), "detects 3 classes, the annotations have 2 categories"),
        (1, ("cat",), "detects 1 classes"),
        (2, ("dog", "cat"), r"2 of 2 classes are named otherwise.* number 1: 'dog' .*--model$"),
        (2, ("cat", "cow"), r"1 of 2 classes are named otherwise.* by their order$"),
    ],
)
def test_classes_and_categories(count, names, said):
    found = class_oddities(["cat", "dog"], count, names)
    if said is None:
        assert found == []
    else:
        assert re.search(said, found[0])


def test_ids_that_are_texts(tmp_path):
    """Numbered in the file's order, so that all that reads them sees whole numbers."""
    texts = {
        "images": [
            {"id": name, "file_name": f"{name}.jpg", "width": 40, "height": 30}
            for name in ("north/b", "a")
        ],
        "annotations": [
            box("x", [1, 1, 5, 5], image_id="a", category_id="dog"),
            box("y", [1, 1, 5, 5], image_id="north/b", category_id="cat"),
        ],
        "categories": [{"id": "cat", "name": "cat"}, {"id": "dog", "name": "dog"}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(texts))
    read = load_annotations(path)
    assert [one["id"] for one in read["images"]] == [1, 2]
    assert [(one["id"], one["image_id"], one["category_id"]) for one in read["annotations"]] == [
        (1, 2, 2),
        (2, 1, 1),
    ]

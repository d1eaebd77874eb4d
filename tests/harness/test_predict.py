"""Predictions are those of the model in PyTorch, in pixels of the image; what else a user meets."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import onnx
import pytest

from engine.errors import EngineError
from graph_surgery.names import COCO
from harness.errors import HarnessError
from harness.predict import PREDICTIONS, find_images, predict
from tests.support import ROOT
from tests.support.grey import BOX, grey_detector, harness
from tests.support.harness_fakes import FakeEngine

IMAGES = sorted((ROOT / "demo" / "data" / "val").glob("*.jpg"))[:20:2]


@pytest.mark.slow
def test_predictions_are_those_of_pytorch(demo_surgered, tmp_path):
    """On images of ten sizes, in batches, the last of which is not full."""
    import torch

    from demo.evaluate import _load
    from export.checkpoint import infer_config, load_model, read_checkpoint
    from export.ssd_resnet34.postprocess import SSDPostProcess

    done = harness(tmp_path, "predict", demo_surgered, *IMAGES, "-o", "out", "--score", "0.6")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / PREDICTIONS).read_text())
    weights = read_checkpoint(ROOT / "demo" / "ssd-resnet34-demo.safetensors")
    model = load_model(weights, infer_config(weights)).eval()
    postprocess = SSDPostProcess(model.config)
    seen = 0
    for number, image in enumerate(IMAGES, start=1):
        with torch.inference_mode():
            rows, counts = postprocess(*model(_load(image, (400, 400))[None]))
        expected = [row for row in rows[0, : counts[0]].tolist() if row[5] >= 0.6]
        ours = [one for one in found if one["image_id"] == number]
        height, width = cv2.imread(str(image)).shape[:2]
        assert {one["file_name"] for one in ours} <= {str(image)}
        assert len(ours) == len(expected)
        for one, (_, top, left, bottom, right, score, label) in zip(ours, expected, strict=True):
            box = left * width, top * height, (right - left) * width, (bottom - top) * height
            np.testing.assert_allclose(one["bbox"], box, atol=0.05)
            assert one["score"] == pytest.approx(score, abs=1e-3)
            assert one["category_id"] == label
            assert one["category_name"] == COCO[int(label) - 1]
            assert one["category_name"] in done.stdout
        assert cv2.imread(str(tmp_path / "out" / image.name)) is not None
        seen += len(expected)
    assert seen > 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the detector of greys, and a folder of pictures, some of which are none."""
    place = tmp_path_factory.mktemp("place")
    grey_detector(place / "grey.onnx")
    for folder in ("deep", "["):
        (place / "shots" / folder).mkdir(parents=True)
    for name, grey in (("a.png", 10), ("deep/a.png", 40), ("[/x].bmp", 20)):
        cv2.imwrite(str(place / "shots" / name), np.full((60, 80, 3), grey, np.uint8))
    jpeg = cv2.imencode(".jpg", np.full((60, 80, 3), 30, np.uint8))[1].tobytes()
    (place / "shots" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (place / "shots" / "text.jpeg").write_text("no picture")
    (place / "shots" / "notes.txt").write_text("not looked at")
    (place / "names").write_text("background\nlight\ndim\nlow\ndark\n")
    return place


@pytest.mark.slow
def test_what_cannot_be_read_is_named_and_the_others_go_on(place):
    done = harness(place, "predict", "grey.onnx", "shots", "-o", "out", "--names", "names")
    assert done.returncode == 1
    assert "shots/cut.jpg: " in done.stderr
    assert "shots/text.jpeg: " in done.stderr
    assert "notes" not in done.stderr
    found = json.loads((place / "out" / PREDICTIONS).read_text())
    told = {one["file_name"]: (one["image_id"], one["category_name"]) for one in found}
    expected = {"[/x].bmp": (1, "dim"), "a.png": (2, "light"), "deep/a.png": (4, "dark")}
    assert told == {f"shots/{name}": what for name, what in expected.items()}
    top, left, bottom, right = BOX
    for one in found:
        assert one["bbox"] == pytest.approx(
            [left * 80, top * 60, (right - left) * 80, (bottom - top) * 60], rel=1e-6
        )
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {"a.jpg", "a-2.jpg", "x].jpg", PREDICTIONS}
    assert "shots/[/x].bmp" in done.stdout
    # of two pictures of a name, which is whose: their greys are told apart above
    light, dark = (cv2.imread(str(place / "out" / f"a{end}.jpg")) for end in ("", "-2"))
    assert light.mean() < dark.mean()
    assert "shots/deep/a.png (a-2.jpg)" in done.stdout
    assert done.stdout.count(".jpg") == 1


@pytest.mark.slow
@pytest.mark.parametrize("guess", ["8x8", ""])
def test_a_guessed_image_size_is_said_at_the_end(place, guess):
    model = onnx.load(place / "grey.onnx")
    onnx.helper.set_model_props(model, {"image_size_guess": guess} if guess else {})
    onnx.save(model, place / f"sized{guess}.onnx")
    done = harness(place, "predict", f"sized{guess}.onnx", "shots/a.png", "-o", f"guess{guess}")
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("the model's image size, 8x8, is a guess; ") == bool(guess)
    assert ("--image-size SIDE (make: IMAGE_SIZE=SIDE)" in last) == bool(guess)
    assert (done.stdout + done.stderr).count("a guess") == bool(guess)


@pytest.mark.slow
def test_labels_without_names_are_numbers(place):
    done = harness(place, "predict", "grey.onnx", "shots/**/a.png", "-o", "numbers")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "numbers" / PREDICTIONS).read_text())
    assert [one["category_name"] for one in found] == ["label 1", "label 4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["shots", "none"], "none: no such image"),
        (["x*.png"], "x*.png: no such image"),
        (["shots/*.webp"], "in shots are some, as shots/"),
        (["shots/a.png", "--names", "short"], "short: cannot read the names"),
        (["shots/a.png", "--engine", "triton", "--url", "a:1,b:2"], "one server"),
        (["shots/a.png", "--engine", "tpu"], "unknown engine 'tpu'"),
    ],
)
def test_mistakes_are_one_line(place, words, complaint):
    done = harness(place, "predict", "grey.onnx", *words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def run(images, output, names=None, **options):
    return predict(FakeEngine(3), images, names or {}, output, score=0.0, **options)


@pytest.fixture
def images(tmp_path):
    for name in "abcdefg":
        grey = np.full((10, 10, 3), 128, np.uint8)
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), grey)
    return find_images([str(tmp_path)])


def test_progress_and_batches(images, tmp_path):
    told = []
    engine = FakeEngine(3)
    predict(
        engine, images, {}, tmp_path / "out", score=0.0, progress=lambda *state: told.append(state)
    )
    assert engine.batches == [3, 3, 1]
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert engine.closed


def test_an_image_is_never_written_over(images, tmp_path):
    before = {image: image.read_bytes() for image in images}
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(HarnessError, match=r"a\.jpg is an image itself"):
            run(images, folder, overwrite=True)
    assert {image: image.read_bytes() for image in images} == before


def test_other_files_are_replaced_only_when_asked(images, tmp_path):
    run(images, tmp_path / "out")
    run(images, tmp_path / "out")  # the same files
    shutil.copy(images[0], tmp_path / "out" / "b.jpg")
    with pytest.raises(EngineError, match=r"b\.jpg: exists already, and is another"):
        run(images, tmp_path / "out")
    run(images, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "b.jpg").read_bytes() != images[0].read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"a": 1}',
        "[1]",
        '[{"image_id": 1, "file_name": "other.jpg"}]',
        '[{"image_id": 2, "file_name": "%s"}]',
        '[{"image_id": [], "file_name": "%s"}]',
    ],
)
def test_predictions_of_others_are_refused_before_the_work(content, images, tmp_path):
    path = tmp_path / "out" / PREDICTIONS
    path.parent.mkdir()
    path.write_text(content.replace("%s", str(images[0])))
    engine = FakeEngine(3)
    with pytest.raises(EngineError, match=r"predictions\.json: exists already, and is another"):
        predict(engine, images, {}, tmp_path / "out", score=0.0)
    assert engine.batches == []
    assert list(path.parent.iterdir()) == [path]
    predict(engine, images, {}, tmp_path / "out", score=0.0, overwrite=True)
    assert json.loads(path.read_text()) == []  # what the engine says of grey images


def test_too_few_names(images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        FakeEngine, "infer", lambda *_: (np.full((3, 1, 7), 2.0, np.float32), [1] * 3)
    )
    with pytest.raises(HarnessError, match="label 2 has no name; there are 1 names"):
        run(images[:3], tmp_path / "out", {1: "one"})


def test_no_folder_to_write_to(images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="cannot write it"):
        run(images, tmp_path / "file")

"""``harness preprocess`` as NVIDIA's preprocess_data.py is called, and a data set of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.data.preprocessed import load_preprocessed, preprocessing_sha256
from engine.manifest import save_engine
from engine.protocol import InputSpec
from engine.quantization.cache import Calibration
from harness.errors import HarnessError
from tests.support.grey import BOX, GREYS, grey_detector, harness
from tests.support.manifests import PLAN, manifest
from tests.support.photos import photo, reference

pytestmark = pytest.mark.slow  # commands in processes of their own

SCALE = 2.640645 / 127  # NVIDIA's published calibration of the image
IDS = [7, 8, 9, 10, 11, 12]  # of the categories; label L is the L-th
NAMES = {"val": ["b.png", "a.png"], "cal": ["c.png", "d.png", "a.png"]}


def write_images(folder: Path, names: list[str], shift: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), photo(20 + number, 30, number + shift))


def write_map(place: Path, dataset: str, split: str, names: list[str]) -> None:
    path = place / "data_maps" / dataset / f"{split}_map.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_cache(path: Path, size: int, name: str = "image") -> None:
    Calibration(
        scales={name: SCALE},
        method="entropy",
        images=1,
        images_sha256="0" * 64,
        model_sha256="0" * 64,
        preprocessing_sha256=preprocessing_sha256((3, size, size)),
        versions={},
        empty_images=0,
        largest={},
        statistics={},
    ).save(path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """COCO, of a few images, where `harness download` puts it."""
    coco = tmp_path / "build" / "data" / "coco"
    for split, folder in (("val", "val2017"), ("cal", "train2017")):
        write_images(coco / folder, NAMES[split], shift=10 * (split == "cal"))
        write_map(tmp_path, "coco", split, NAMES[split])
    return tmp_path


def preprocess(place: Path, *arguments: str) -> str:
    done = harness(place, "preprocess", "--workers", "1", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error(place: Path, *arguments: str) -> str:
    done = harness(place, "preprocess", "--workers", "1", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("harness: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def sets(place: Path) -> set[str]:
    root = place / "build" / "preprocessed_data"
    return {str(path.relative_to(root)) for path in root.glob("*/*") if path.is_symlink()}


def test_both_formats_of_the_benchmark(place: Path) -> None:
    write_cache(place / "cal.json", 1200)
    said = preprocess(place, "--formats", "int8_linear,fp32", "--calibration", "cal.json")
    assert said.count("2 images in ") == 2
    assert said.count("3 images in ") == 1
    assert sets(place) == {
        "coco-val/float32_1200x1200",
        "coco-val/int8_1200x1200",
        "coco-cal/float32_1200x1200",
    }
    root = place / "build" / "preprocessed_data"
    manifest = json.loads((root / "coco-val/int8_1200x1200/manifest.json").read_text())
    scale = manifest["scale"]
    assert SCALE <= scale <= SCALE * 1.001  # a float16, as in the INT8 graph
    image = reference(cv2.imread(str(place / "build/data/coco/val2017/a.png")), 1200, 1200)
    stored = np.load(root / "coco-val/float32_1200x1200/a.png.npy")
    np.testing.assert_allclose(stored, image, rtol=0, atol=1e-5)
    path = root / "coco-val/int8_1200x1200/a.png.npy"
    assert 0 <= path.stat().st_size - 3 * 1200 * 1200 <= 128
    assert np.abs(np.load(path) - np.clip(image / scale, -127, 127)).max() <= 0.51


def test_one_split(place: Path) -> None:
    grey_detector(place / "grey.onnx")
    preprocess(place, "grey.onnx", "--cal_only")
    assert sets(place) == {"coco-cal/float32_8x8"}
    preprocess(place, "grey.onnx", "--val_only")
    assert sets(place) == {"coco-cal/float32_8x8", "coco-val/float32_8x8"}

    def written() -> dict[Path, int]:
        found = (path for name in sets(place) for path in (root / name).glob("*.npy"))
        return {path: path.stat().st_mtime_ns for path in found}

    root = place / "build" / "preprocessed_data"
    before = written()
    preprocess(place, "grey.onnx")
    assert written() == before
    preprocess(place, "grey.onnx", "--overwrite")
    assert all(time > before[path] for path, time in written().items())


def test_calls_that_cannot_be_meant(place: Path) -> None:
    grey_detector(place / "grey.onnx")
    write_cache(place / "cal.json", 1200)
    write_cache(place / "8.json", 8, name="input")
    (place / "no.json").write_text("{}")
    for arguments, message in (
        (["--val_only", "--cal_only"], "leave nothing to do"),
        (["--formats", "int8"], "unknown format 'int8'; choose of: fp32, int8_linear"),
        (["--formats", ""], "unknown format ''"),
        (["--formats", "int8_linear"], "needs the scale of the image"),
        (["grey.onnx", "--formats", "int8_linear"], "needs the scale of the image"),
        (["--cal_only", "--formats", "int8_linear"], "calibration images are always fp32"),
        (["--cal_only", "--calibration", "cal.json"], "calibration images are always fp32"),
        (["grey.onnx", "--calibration", "cal.json"], "does not belong to images of 8x8"),
        (["grey.onnx", "--calibration", "8.json"], "no scale for 'image'"),
        (["--calibration", "no.json"], "no calibration cache"),
        (["--preprocessed", "here"], "takes one set and these are 2"),
        (["--dataset", "imagenet"], "there are: coco"),
        (["nowhere.onnx"], "nowhere.onnx"),
    ):
        assert message in error(place, *arguments)
    assert sets(place) == set()


def annotate(path: Path, sizes: dict[str, tuple[int, int]], labels: list[int]) -> None:
    """One object on every image, where the detector sees one."""
    images, annotations = [], []
    for number, (name, (height, width)) in enumerate(sizes.items(), start=1):
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        top, left, bottom, right = BOX
        box = [left * width, top * height, (right - left) * width, (bottom - top) * height]
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": IDS[labels[number - 1] - 1],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": str(number)} for number in IDS]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


def write_greys(folder: Path, greys: list[int]) -> dict[str, tuple[int, int]]:
    folder.mkdir(parents=True, exist_ok=True)
    for grey in greys:
        cv2.imwrite(str(folder / f"{grey}.png"), np.full((16, 24, 3), grey, np.uint8))
    return {f"{grey}.png": (16, 24) for grey in greys}


RUN = ["run", "grey.onnx", "--test_mode", "AccuracyOnly", "--threads", "1"]


def mean_average_precision(place: Path, logs: str) -> float:
    (path,) = (place / logs).rglob("result.json")
    return float(json.loads(path.read_text())["accuracy"]["mAP"])


@pytest.mark.parametrize("dataset", ["coco", "traffic"])
def test_a_new_validation_set(place: Path, dataset: str) -> None:
    """Images, annotations and map are replaced, or put in folders of a name of their own."""
    grey_detector(place / "grey.onnx")
    preprocess(place, "grey.onnx", "--val_only")
    data = place / "build" / "data" / dataset
    images, annotations = (
        (data / "val2017", data / "annotations" / "instances_val2017.json")
        if dataset == "coco"
        else (data / "val", data / "annotations" / "instances_val.json")
    )
    sizes = write_greys(images, GREYS[:3])
    annotate(annotations, sizes, [grey // 10 for grey in GREYS[:3]])
    coco_before = sorted((place / "build/data/coco").rglob("*.*"))
    if dataset == "coco":  # the map and the preprocessed images are still those of before
        assert "lacks 2 images of" in error(place, "grey.onnx", "--val_only")
    write_map(place, dataset, "val", list(sizes)[::-1])
    arguments = ["--dataset", dataset]
    done = harness(place, *RUN, *arguments)
    assert done.returncode == 2
    stale = "another map than" if dataset == "coco" else "holds no preprocessed images"
    assert stale in done.stderr
    preprocess(place, "grey.onnx", "--val_only", *arguments)
    done = harness(place, *RUN, *arguments, "--log-dir", "logs")
    assert done.returncode == 0, done.stderr
    assert mean_average_precision(place, "logs") == pytest.approx(1.0)
    assert sorted((place / "build/data/coco").rglob("*.*")) == coco_before
    # a picture that changes is noticed
    cv2.imwrite(str(images / f"{GREYS[1]}.png"), np.full((16, 24, 3), 10, np.uint8))
    done = harness(place, *RUN, *arguments)
    assert done.returncode == 2
    assert f"1 of 3 images in {images.relative_to(place)} have changed" in done.stderr


def test_annotations_are_checked_before_anything_is_preprocessed(place: Path) -> None:
    annotations = place / "build/data/coco/annotations/instances_val2017.json"
    annotate(annotations, {"a.png": (20, 30), "b.png": (21, 30)}, [1, 2])
    content = json.loads(annotations.read_text())
    content["annotations"][0]["category_id"] = 99
    annotations.write_text(json.dumps(content))
    assert "category_id that 'categories' does not hold, the first is 99" in error(place)
    annotations.write_text("[]")
    assert "is no COCO instances file" in error(place)
    assert sets(place) == set()


def test_a_built_engine_is_what_images_are_made_for(place: Path) -> None:
    """Its manifest says what it takes; nothing of it runs here."""
    spec = InputSpec("image", (3, 30, 20), "int8", SCALE)
    save_engine(place / "model.engine", PLAN, manifest(input=spec))
    assert "2 images in" not in preprocess(place, "model.engine", "--cal_only")
    preprocess(place, "model.engine", "--val_only")
    made = load_preprocessed(place / "build/preprocessed_data/coco-val/int8_30x20", spec)
    assert list(made.files) == NAMES["val"]
    (place / "model.engine.json").unlink()
    assert "no manifest model.engine.json beside it" in error(place, "model.engine")


def test_make_uses_again_what_it_left(place, monkeypatch):
    """And makes anew what --skip-bad left out."""
    from harness.make import route

    preprocess(place, "--cal_only")
    monkeypatch.chdir(place)
    said = []
    spec = InputSpec("image", (3, 1200, 1200), "float32")
    benchmark = route.route_of("ssd-resnet34", None, Path("build"), said.append)
    route.preprocess(benchmark, "cal", spec)
    assert said == [
        "preprocess coco-cal: reused build/preprocessed_data/coco-cal/float32_1200x1200"
    ]
    bad = place / "build" / "data" / "coco" / "train2017" / "d.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:40])
    preprocess(place, "--cal_only", "--skip-bad")
    with pytest.raises(HarnessError, match=r"d\.png"):
        route.preprocess(benchmark, "cal", spec)

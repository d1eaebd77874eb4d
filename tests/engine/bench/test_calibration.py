"""No calibration set ruins the demo model in silence: the sets of the bench, judged by COCO mAP."""

from __future__ import annotations

import onnx
import pytest

from engine.bench.calibration import EMPTY_SETS, SETS, mean_precision, write_set
from engine.comparison.compare import load_truth
from engine.data.preprocessed import load_preprocessed
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from tests.support import ROOT
from tests.support.calibrated import SPEC

DATA = ROOT / "demo" / "data"
JUDGED = (
    "as they are",
    "middle ninth of each on white",
    "night (pixels / 8)",
    "one picture",
    "white ones and the busiest",
)
"""Sets that the tests take; `docs/measurements/calibration_sets.json` has all."""


@pytest.fixture(scope="module")
def demo(demo_surgered, demo_build):
    """The detector, the calibration pictures, and what tells the mAP of a model."""
    sets = demo_build / "preprocessed_data"
    judged, pictures = (
        load_preprocessed(sets / f"demo-{split}" / "float32_400x400", SPEC)
        for split in ("val", "cal")
    )
    truth = load_truth(DATA / "annotations" / "instances_val.json", judged.files)
    images = pictures.load(range(len(pictures.files)))
    return demo_surgered, images, lambda path: mean_precision(path, judged, truth)


@pytest.fixture(scope="module")
def reference(demo):
    model, _, precision = demo
    found = precision(model)
    assert found > 0.7
    return found


@pytest.mark.parametrize("name", JUDGED)
def test_the_default_keeps_the_accuracy(demo, reference, name, tmp_path) -> None:
    model, images, precision = demo
    assert len(images) == 64
    calibration = calibrate(load_detector(model), write_set(SETS[name](images), tmp_path))
    path = tmp_path / "int8.onnx"
    onnx.save(quantize(load_detector(model).model, calibration), path)
    assert precision(path) >= 0.98 * reference
    assert (calibration.warning is not None) == name.startswith("white ones")


@pytest.mark.parametrize("name", EMPTY_SETS)
def test_pictures_without_anything_to_see_are_said(demo, name, tmp_path) -> None:
    model, images, _ = demo
    calibration = calibrate(load_detector(model), write_set(EMPTY_SETS[name](images[:8]), tmp_path))
    said = f"{calibration.empty_images} of 8 calibration images show nothing"
    assert calibration.warning.startswith(said)

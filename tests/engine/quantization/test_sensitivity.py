"""Sensitivity: a layer made bad comes first, and the numbers are those of the INT8 models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from engine.quantization.sensitivity import compare, sensitivity
from tests.support.calibrated import run, snr_db, write_images

BAD = "model.layer2.0.3.conv1"


@pytest.fixture(scope="module")
def images(small_images, tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), small_images)


@pytest.fixture(scope="module")
def calibration(surgered, images):
    """Scales of the largest values, but one so wide that two steps are left between 0 and it."""
    good = calibrate(load_detector(surgered), images, method="minmax")
    model = load_detector(surgered).model
    # the only reader of the convolution's input besides the addition of its block
    (node,) = (n for n in model.graph.node if f"model.{BAD}.weight" in n.input)
    scales = {**good.scales, node.input[0]: good.scales[node.input[0]] * 64}
    return dataclasses.replace(good, scales=scales)


@pytest.fixture(scope="module")
def result(surgered, images, calibration):
    seen = []
    detector = load_detector(surgered)
    found = sensitivity(
        detector, calibration, images, limit=1, progress=lambda *done: seen.append(done)
    )
    assert seen == [(done, 103) for done in range(1, 104)]
    return found


def test_the_bad_layer_comes_first(result) -> None:
    assert result.images == 1
    assert len(result.layers) == len({row.layer for row in result.layers}) == 51
    # the widened tensor is read by this convolution and, as a skip, by the end of its block
    assert {row.layer for row in result.layers[:2]} == {BAD, BAD.replace("conv1", "conv2")}
    worst = [row.only_quantized.worst_db for row in result.layers]
    assert worst == sorted(worst)
    best = max(result.layers, key=lambda row: row.gain_db)
    assert best.layer in {row.layer for row in result.layers[:2]}
    for row in result.layers:
        assert row.gain_db == row.only_float.worst_db - result.all_quantized.worst_db


def test_a_head_changes_its_own_tensor_alone(result) -> None:
    rows = {row.layer: row.only_quantized for row in result.layers}
    for level in range(6):
        assert rows[f"loc.{level}"].conf_db == np.inf
        assert rows[f"conf.{level}"].loc_db == np.inf
        assert np.isfinite([rows[f"loc.{level}"].loc_db, rows[f"conf.{level}"].conf_db]).all()


@pytest.mark.parametrize("layer", ["conf.0", BAD])
def test_numbers_are_those_of_the_quantised_models(
    result, surgered, calibration, small_images, layer
) -> None:
    """SNR from `quantize` with all other layers kept float, or this one, run by the test itself."""
    model = load_detector(surgered).model
    (nms,) = (n for n in model.graph.node if n.op_type == "NMS_OPT_TRT")
    names = list(nms.input[:-1])
    image = small_images[:1]
    reference = run(model, image, names)
    others = [row.layer for row in result.layers if row.layer != layer]
    alone = run(quantize(model, calibration, keep_float=others), image, names)
    (row,) = (row for row in result.layers if row.layer == layer)
    assert row.only_quantized.conf_db == pytest.approx(snr_db(reference[6:], alone[6:]), abs=0.2)

    int8 = quantize(model, calibration, keep_float=[layer])
    scale = np.float32({e.key: e.value for e in int8.metadata_props}["input_scale"])
    without = run(int8, np.clip(np.rint(image / scale), -127, 127).astype(np.int8), names)
    assert row.only_float.conf_db == pytest.approx(snr_db(reference[6:], without[6:]), abs=2)


def test_compare() -> None:
    reference = [np.float32([[3, 4]]), np.float32([[1]])]
    same = compare(reference, reference)
    assert (same.loc_db, same.conf_db) == (np.inf, np.inf)
    noise = compare(reference, [np.float32([[3, 4.5]]), np.float32([[2]])])
    assert noise.loc_db == pytest.approx(20)  # 25 over 0.25
    assert noise.conf_db == pytest.approx(0)
    assert noise.worst_db == noise.conf_db


def test_refusals(surgered, images, calibration) -> None:
    with pytest.raises(EngineError, match="4 images wanted"):
        sensitivity(load_detector(surgered), calibration, images, limit=4)
    other = dataclasses.replace(calibration, model_sha256="")
    with pytest.raises(EngineError, match="another model"):
        sensitivity(load_detector(surgered), other, images, limit=1)

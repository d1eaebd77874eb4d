"""Detectors with data in files beside them: what they are, calibrated, quantised, run and built."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from engine.backends.split import split
from engine.comparison.files import compare_files, save_comparison
from engine.errors import EngineError
from engine.inspect import inspect_file
from engine.load import load_engine
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.network import network_sha256, open_session
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from graph_surgery import protobuf
from graph_surgery.files import save
from tests.support.calibrated import write_images
from tests.support.external import changed

ROWS = ["detections", "num_detections"]


@pytest.fixture(scope="module")
def calibration(surgered, small_images, tmp_path_factory):
    images = write_images(tmp_path_factory.mktemp("images"), small_images)
    return calibrate(load_detector(surgered), images)


def rows(path, images):
    session = load_engine("onnxruntime", path).session()
    try:
        return session.infer(images)
    finally:
        session.close()


def test_what_it_is(outside, surgered, small_images, tmp_path):
    """The network is the same wherever its weights lie; the file is told by its data, too."""
    detector, inside = load_detector(outside), load_detector(surgered)
    assert sum(map(protobuf.is_outside, detector.model.graph.initializer)) >= 30
    assert detector.model.ByteSize() < inside.model.ByteSize() / 3
    placement = find_placement(inside.model)
    assert find_placement(detector.model).tensors == placement.tensors
    assert network_sha256(detector.model, placement) == network_sha256(inside.model, placement)
    for one, other in zip(rows(outside, small_images), rows(surgered, small_images), strict=True):
        np.testing.assert_array_equal(one, other)
    other = load_detector(changed(outside, tmp_path))
    assert other.path.read_bytes() == outside.read_bytes()
    assert network_sha256(other.model, placement) != network_sha256(inside.model, placement)
    hashes = {inspect_file(path)["sha256"] for path in (outside, surgered, other.path)}
    assert len(hashes) == 3
    for path in (outside, other.path):
        assert load_engine("onnxruntime", path).manifest["onnx_sha256"] in hashes


def test_calibration(outside, calibration, small_images, tmp_path):
    images = write_images(tmp_path, small_images)
    found = calibrate(load_detector(outside), images)
    assert replace(found, model=calibration.model) == calibration


@pytest.mark.parametrize("float_type", ["fp32", "fp16"])
def test_quantisation(outside, surgered, calibration, tmp_path, float_type):
    """The very graph of the whole model. In FP16 all constants are new; they lie beside it, too."""
    detector = load_detector(outside)
    expected = quantize(load_detector(surgered).model, calibration, float_type=float_type)
    found = quantize(detector.model, calibration, float_type=float_type)
    save(expected, tmp_path / "inside.onnx")
    save(found, tmp_path / "outside.onnx")
    (data,) = tmp_path.glob("*.data")
    assert data.name.startswith("outside.onnx.")
    again = onnx.load(tmp_path / "outside.onnx")
    for tensor in again.graph.initializer:
        tensor.ClearField("data_location")
    assert again == expected
    int8 = np.random.default_rng(3).integers(-127, 128, (2, 3, 400, 400), np.int8)
    pair = (rows(tmp_path / name, int8) for name in ("inside.onnx", "outside.onnx"))
    for one, other in zip(*pair, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(EngineError, match="another model: the same tensors, but other weights"):
        quantize(load_detector(changed(outside, tmp_path)).model, calibration)


def test_a_network_that_no_protobuf_holds(outside, calibration, small_images, monkeypatch):
    """With a limit that the weights exceed once they are float16."""
    model = quantize(load_detector(outside).model, calibration, float_type="fp16")
    float32 = load_detector(outside).model
    monkeypatch.setattr(protobuf, "LARGEST", 100_000)
    again = quantize(float32, calibration, float_type="fp16")
    assert not protobuf.fits(again)
    assert again == model
    monkeypatch.undo()
    images = np.zeros((1, 3, 400, 400), np.int8)
    expected = open_session(model).run(ROWS, {"image": images})
    monkeypatch.setattr(protobuf, "LARGEST", 100_000)
    for one, other in zip(open_session(again).run(ROWS, {"image": images}), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_lies_in_front_of_the_kernels(outside, surgered, small_images, monkeypatch):
    """The network that ONNX Runtime runs on a GPU; our library is not needed to see it."""
    for name in ("load_library", "workspace_size"):
        monkeypatch.setattr(f"engine.backends.split.{name}", lambda *_: None)
    sides = []
    for path in (outside, surgered):
        parts = split(load_detector(path).model)
        session = open_session(parts.network)
        sides.append(session.run(list(parts.heads), {"image": small_images}))
    for one, other in zip(*sides, strict=True):
        np.testing.assert_array_equal(one, other)


def test_comparison(outside, surgered, tmp_path):
    """As in its file; what -o names is written once, and again only where it says the same."""

    def compare(first, second, kept=None, random=2, **overrides):
        nothing = dict.fromkeys(["data", "limit", "annotations"])
        return compare_files(
            first, second, **nothing, random=random, overrides=overrides, kept=kept
        )

    found, document = compare(outside, surgered)
    assert found.passed
    assert all(np.isinf(head.snr_least) for head in found.heads)
    output = tmp_path / "figures.json"
    assert save_comparison(output, document, overwrite=False)
    before = output.read_bytes()
    _, again = compare(outside, surgered, output)
    assert not save_comparison(output, {**again, "command": "another"}, overwrite=False)
    another = "figures.json: exists already, and is another: remove it or pass --force"
    for arguments in ({"random": 1}, {"snr": 3.0}, {"second": changed(outside, tmp_path)}):
        with pytest.raises(EngineError, match=another):
            compare(**({"first": outside, "second": surgered, "kept": output} | arguments))
    with pytest.raises(EngineError, match=another):
        save_comparison(output, {**again, "passed": False}, overwrite=False)
    assert output.read_bytes() == before
    assert save_comparison(output, {**again, "passed": False}, overwrite=True)
    assert json.loads(output.read_bytes())["passed"] is False

"""A small RetinaNet, NMS_OPT_TRT version 2, in TensorRT and Triton on a GPU; see test_gpu.py."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from engine.backends.triton import engine as triton
from engine.load import load_engine
from engine.manifest import load_manifest
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from harness.triton.repository import write_repository
from harness.triton.server import running_server
from tests.support.calibrated import write_images
from tests.support.plans import detections, matched

cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
pytest.importorskip("tensorrt", reason="needs TensorRT", exc_type=(ImportError, OSError))
torch = pytest.importorskip("torch")
from tests.support.retinanet import SMALL, surgered  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        int(cuda.cudaGetDeviceCount()[0]) != 0 or not cuda.cudaGetDeviceCount()[1],
        reason="needs a GPU",
    ),
]

KINDS = ("fp16", "fp32")


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(2)
    return torch.randn(16, 3, *SMALL.image_shape).numpy()


@pytest.fixture(scope="module")
def float_model(folder):
    onnx.save(surgered(), folder / "retina.nms.onnx")
    return folder / "retina.nms.onnx"


@pytest.fixture(scope="module")
def int8_models(float_model, pictures, folder):
    """The same in INT8, what stays float as FP16 and as FP32."""
    images = folder / "images"
    images.mkdir()
    calibration = calibrate(
        load_detector(float_model), write_images(images, pictures), method="minmax"
    )
    paths = {kind: folder / f"retina.int8.{kind}.onnx" for kind in KINDS}
    for kind, path in paths.items():
        onnx.save(quantize(onnx.load(float_model), calibration, float_type=kind), path)
    return paths


def images_for(model, pictures):
    scale = load_engine("onnxruntime", model).input_spec.scale
    if scale is None:
        return pictures
    return np.clip(np.rint(pictures / np.float32(scale)), -127, 127).astype(np.int8)


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_float_plan(float_model, make_plan, pictures, batch):
    plan = make_plan(float_model)
    assert load_manifest(plan).keep_top_k == 300
    there = detections(load_engine("onnxruntime", float_model), pictures)
    here = detections(load_engine("tensorrt", plan), pictures, batch)
    share, differences = matched(there, here, 0.99)
    assert share > 0.99  # of some hundreds of an image a few hang on rounding
    assert np.abs(differences).max() < 1e-4


def test_int8_plan(int8_models, make_plan, pictures):
    """Random weights make detections of little but rounding; so FP16 and FP32 say how much."""
    images = images_for(int8_models["fp16"], pictures)
    half, full = (detections(load_engine("onnxruntime", int8_models[k]), images) for k in KINDS)
    here = detections(load_engine("tensorrt", make_plan(int8_models["fp16"])), images)
    usual, _ = matched(half, full, 0.9)
    share, _ = matched(half, here, 0.9)
    assert share > 0.8 * usual > 0.2


def test_plan_through_triton(int8_models, make_plan, pictures, tritonserver, tmp_path):
    """The server gives the known answers, and the detections of the plan without it."""
    plan, images = make_plan(int8_models["fp16"]), images_for(int8_models["fp16"], pictures)
    direct = detections(load_engine("tensorrt", plan), images)
    repository = write_repository(plan, tmp_path / "models", "tensorrt")
    with running_server(tritonserver, repository, tmp_path / "log") as server:
        engine = triton.load(plan, device=server.url)
        share, differences = matched(direct, detections(engine, images), 0.99)
        assert share > 0.99
        assert np.abs(differences).max() < 0.01

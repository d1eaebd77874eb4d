"""Calibration on a GPU, held against calibration on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.histogram import BINS
from tests.support.calibrated import write_images
from tests.support.demo_images import demo_images

ort = pytest.importorskip("onnxruntime")
_HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.mark.gpu
@pytest.mark.skipif(not _HAS_CUDA, reason="needs onnxruntime-gpu")
@pytest.mark.parametrize("method", ["auto", "entropy", "minmax"])
def test_scales_of_a_gpu_are_those_of_the_cpu(demo_surgered, tmp_path, method) -> None:
    detector = load_detector(demo_surgered)
    source = write_images(tmp_path, demo_images(12))
    cpu = calibrate(detector, source, method=method)
    gpu = calibrate(detector, source, method=method, device="cuda", batch=2)
    assert gpu.images_sha256 == cpu.images_sha256
    assert gpu.scales.keys() == cpu.scales.keys()
    assert gpu.scales["image"] == cpu.scales["image"]
    for name, scale in cpu.scales.items():
        if (known := cpu.statistics.get(name)) is not None:
            limit = 2.0 ** math.frexp(known.scales["minmax"] * 127)[1]
            assert abs(gpu.scales[name] - scale) * 127 <= limit / BINS * (1 + 1e-6), name
    for name, scale in cpu.sums.items():
        np.testing.assert_allclose(gpu.sums[name], scale, rtol=2e-2, err_msg=name)


@pytest.mark.skipif(_HAS_CUDA, reason="needs ONNX Runtime without a GPU")
def test_without_onnxruntime_for_gpus_it_says_what_to_install(demo_surgered, tmp_path) -> None:
    source = write_images(tmp_path, demo_images(1))
    with pytest.raises(EngineError, match="install onnxruntime-gpu"):
        calibrate(load_detector(demo_surgered), source, device="cuda")

"""INT8 detectors with made-up scales: for what depends on the graph, not on its accuracy."""

from __future__ import annotations

import onnx

from engine.data.preprocessed import preprocessing_sha256
from engine.model import load_detector
from engine.quantization.cache import Calibration
from engine.quantization.network import network_sha256
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize


def write_int8(surgered, path, float_type):
    """Quantise a surgered detector with the scale 1/16 everywhere; return the path written."""
    model = load_detector(surgered).model
    placement = find_placement(model)
    calibration = Calibration(
        scales=dict.fromkeys(placement.tensors, 1 / 16),
        method="entropy",
        images=1,
        images_sha256="0" * 64,
        model_sha256=network_sha256(model, placement),
        preprocessing_sha256=preprocessing_sha256(placement.shape),
        versions={},
        empty_images=0,
        largest={},
        statistics={},
    )
    onnx.save(quantize(model, calibration, float_type=float_type), path)
    return path

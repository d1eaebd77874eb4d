"""INT8 detectors with made-up scales: for what depends on the graph, not on its accuracy."""

from __future__ import annotations

import onnx

from engine.calibration_cache import Calibration
from engine.network import load_detector, network_sha256
from engine.placement import find_placement
from engine.preprocessed import preprocessing_sha256
from engine.quantize import quantize


def write_int8(surgered, path, float_type):
    """Quantise a surgered detector with the scale 1/16 everywhere; return the path written."""
    model = load_detector(surgered)
    placement = find_placement(model)
    calibration = Calibration(
        scales={point.tensor: 1 / 16 for point in placement.points},
        method="entropy",
        images=1,
        images_sha256="0" * 64,
        model_sha256=network_sha256(model, placement),
        preprocessing_sha256=preprocessing_sha256(placement.shape),
        versions={},
    )
    onnx.save(quantize(model, calibration, float_type=float_type), path)
    return path

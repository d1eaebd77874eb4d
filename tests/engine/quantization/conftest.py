"""The small detector and its INT8 forms, shared by the tests of this folder."""

from __future__ import annotations

import pytest

from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from tests.support.calibrated import write_images


@pytest.fixture(scope="session")
def calibration(surgered, small_images, tmp_path_factory):
    images = write_images(tmp_path_factory.mktemp("images"), small_images)
    return calibrate(load_detector(surgered), images, method="minmax")


@pytest.fixture(scope="session")
def model(surgered):
    return load_detector(surgered).model


@pytest.fixture(scope="session")
def int8(model, calibration):
    return quantize(model, calibration)


@pytest.fixture(scope="session")
def half(model, calibration):
    return quantize(model, calibration, float_type="fp16")

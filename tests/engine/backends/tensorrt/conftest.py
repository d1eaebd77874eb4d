"""TensorRT-RTX, the plugin in it, and a detector for both."""

from __future__ import annotations

import ctypes

import pytest

from engine.backends.tensorrt.module import RTX, import_tensorrt
from plugin_cuda.library import load_library
from tests.support.int8_models import write_int8


@pytest.fixture(scope="session")
def trt():
    return import_tensorrt(RTX)


@pytest.fixture
def plugin(trt, trt_plugin_library):
    """The plugin, registered for the test."""
    ctypes.CDLL(str(trt_plugin_library))  # keeps the code in place: a network may outlive its test
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(trt_plugin_library))
    assert handle is not None
    yield
    registry.deregister_library(handle)


@pytest.fixture
def kernels(plugin_libraries):
    return load_library(plugin_libraries / "libnms_opt.so")


@pytest.fixture(scope="session")
def int8(demo_surgered, tmp_path_factory):
    """The demo detector in INT8 and FP16, with made-up scales."""
    return write_int8(demo_surgered, tmp_path_factory.mktemp("int8") / "d.int8.onnx", "fp16")

"""TensorRT-RTX, the plugin in it, and a detector for both."""

from __future__ import annotations

import pytest

from engine.backends.tensorrt.build import build
from engine.backends.tensorrt.module import RTX, import_tensorrt
from engine.backends.tensorrt.options import BuildOptions
from engine.model import load_detector
from harness.triton.server import find_server, server_backends
from plugin_cuda.library import load_library
from tests.support import ROOT
from tests.support.int8_models import write_int8


@pytest.fixture(scope="session")
def trt():
    return import_tensorrt(RTX)


@pytest.fixture(scope="session")
def plugin(trt, trt_plugin_library):
    """The plugin, registered from here on.

    TensorRT-RTX 1.7.1 does not load a library of two creators again that it has let go of.
    """
    assert trt.get_plugin_registry().load_library(str(trt_plugin_library)) is not None


@pytest.fixture
def kernels(plugin_libraries):
    return load_library(plugin_libraries / "libnms_opt.so")


@pytest.fixture(scope="session")
def int8(demo_surgered, tmp_path_factory):
    """The demo detector in INT8 and FP16, with made-up scales."""
    return write_int8(demo_surgered, tmp_path_factory.mktemp("int8") / "d.int8.onnx", "fp16")


# TensorRT itself, on a GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture(scope="module")
def make_plan(trt_plugin_library, folder):
    def make(model, name="plan", **options):
        output = folder / f"{model.stem}.{name}.engine"
        if not output.exists():
            chosen = {"opt_batch": 8, "max_batch": 16, "optimization_level": 1, **options}
            cache = folder / "timing.cache"
            settings = BuildOptions(plugins=(trt_plugin_library,), timing_cache=cache, **chosen)
            build(load_detector(model), "tensorrt", output, settings)
        return output

    return make


@pytest.fixture(scope="module")
def tritonserver():
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    try:
        found = find_server(ROOT / "build")
    except Exception as error:
        pytest.skip(str(error))
    if "tensorrt" not in server_backends(found):
        pytest.skip(f"{found} has no backend tensorrt")
    return found

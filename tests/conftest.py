"""What several test modules share."""

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.support import ROOT

# A background job is started with SIGINT ignored, and so would be all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def plugin_libraries(pytestconfig) -> Path:
    """The folder with the libraries of build-plugin for sm_80 and sm_90.

    The build tree stays in pytest's cache, so that another run takes a second.
    """
    from plugin_cuda.build import CompileError, build, plan
    from plugin_cuda.errors import PluginError
    from plugin_cuda.toolchain import find_cmake, find_nvcc

    try:
        find_nvcc()
        find_cmake()
    except PluginError as error:
        pytest.skip(str(error))
    folder = pytestconfig.cache.mkdir("plugin_libraries")
    try:
        build(plan(folder, [80, 90]))
    except CompileError as error:
        pytest.fail(f"{error.output}\n{error}")
    return folder


@pytest.fixture(scope="session")
def trt_plugin_library(plugin_libraries) -> Path:
    """The TensorRT plugin among them."""
    from plugin_cuda.toolchain import find_tensorrt_headers

    if find_tensorrt_headers() is None:
        pytest.skip("needs TensorRT's headers: set TENSORRT_INCLUDE_DIR or install kernel-lens")
    return plugin_libraries / "libnmsoptplugin.so"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference data beside the checkout."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"golden data not found beside the checkout: {folder.name}")
    return folder


@pytest.fixture(scope="session")
def driver(trt_plugin_library, tmp_path_factory):
    """The TensorRT plugin's library, loaded by a driver that plays TensorRT."""
    from plugin_cuda.toolchain import find_nvcc, find_tensorrt_headers
    from tests.support.plugin_driver import Driver, compile_driver

    headers = find_tensorrt_headers()
    library = compile_driver(tmp_path_factory.mktemp("driver"), find_nvcc().path, headers.path)
    return Driver(library, trt_plugin_library)


@pytest.fixture(scope="session")
def small_model():
    """A narrow SSD-ResNet34 at 400x400 with random weights and sane activations."""
    from export.config import SSDConfig
    from tests.support.random_model import random_model

    return random_model(SSDConfig(image_size=400, width=4))


@pytest.fixture(scope="session")
def small_checkpoint(small_model, tmp_path_factory) -> Path:
    """The small model as a .safetensors checkpoint that states its configuration."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(small_model.state_dict(), path, {"ssd_config": small_model.config.to_json()})
    return path


@pytest.fixture(scope="session")
def exported(small_checkpoint, tmp_path_factory) -> Path:
    """The small model exported by the command that users call."""
    import subprocess
    import sys

    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    command = [sys.executable, "-m", "export", "--weights", small_checkpoint, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "PyTorch and ONNX Runtime agree" in done.stdout
    return path


@pytest.fixture(scope="session")
def small_images() -> np.ndarray:
    """Three normalised images for the small model, float32 [3, 3, 400, 400]."""
    values = np.random.default_rng(5).standard_normal((3, 3, 400, 400), np.float32)
    return values.clip(-1.8, 2.2)  # where the pixels of every channel end

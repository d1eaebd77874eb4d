"""What several test modules share."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests.support import ROOT, command
from tests.support.shared import once

# A background job is started with SIGINT ignored, and so would be all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "tests",
    max_examples=60,
    deadline=None,  # the machine may be busy
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")

MARKS = {
    "slow": {"small_model", "demo_exported", "runs"},
    "triton": {"server", "start", "serve"},
    "build": {"plugin_libraries", "nms_library", "wall_clock"},
    "golden": {"golden"},
}
"""Fixtures; what uses one of them, by another fixture or itself, is marked."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        for mark, fixtures in MARKS.items():
            if not fixtures.isdisjoint(item.fixturenames):
                item.add_marker(mark)


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
    from export.ssd_resnet34.config import SSDConfig
    from tests.support.random_model import random_model

    return random_model(SSDConfig(image_size=400, width=4))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """The folder for what is made once; pytest-xdist's workers have it in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def small_checkpoint(small_model, shared) -> Path:
    """The small model as a .safetensors checkpoint that states its configuration."""
    from safetensors.torch import save_file

    state, config = small_model.state_dict(), {"ssd_config": small_model.config.to_json()}
    return once(shared / "small.safetensors", lambda path: save_file(state, path, config))


@pytest.fixture(scope="session")
def exported(small_checkpoint, shared) -> Path:
    """The small model exported by the command that users call."""

    def export(path):
        done = command("export", "--weights", small_checkpoint, "-o", path)
        assert "PyTorch and ONNX Runtime agree" in done.stdout

    return once(shared / "small.onnx", export)


@pytest.fixture(scope="session")
def surgered(exported, shared) -> Path:
    """The small model with NMS_OPT_TRT."""
    from tests.support.calibrated import write_surgered

    return once(shared / "small.nms.onnx", lambda path: write_surgered(exported, path))


@pytest.fixture(scope="session")
def outside(surgered, tmp_path_factory) -> Path:
    """The small surgered model with its weights in another file, w.bin, by onnx's own writer."""
    import onnx

    path = tmp_path_factory.mktemp("outside") / "model.onnx"
    onnx.save(onnx.load(surgered), path, save_as_external_data=True, location="w.bin")
    return path


@pytest.fixture(scope="session")
def small_images() -> np.ndarray:
    """Three normalised images for the small model, float32 [3, 3, 400, 400]."""
    values = np.random.default_rng(5).standard_normal((3, 3, 400, 400), np.float32)
    return values.clip(-1.8, 2.2)  # where the pixels of every channel end


# The demo detector by the commands that users call; a test that changes one of the files copies it.


@pytest.fixture(scope="session")
def demo_exported(shared) -> Path:
    """The shipped checkpoint's ONNX file."""
    weights = ROOT / "demo" / "ssd-resnet34-demo.safetensors"
    return once(
        shared / "demo.onnx", lambda path: command("export", "--weights", weights, "-o", path)
    )


@pytest.fixture(scope="session")
def demo_surgered(demo_exported, shared) -> Path:
    """The demo detector with NMS_OPT_TRT."""
    return once(
        shared / "demo.nms.onnx", lambda path: command("graph_surgery", "nms", demo_exported, path)
    )


@pytest.fixture(scope="session")
def demo_build(demo_surgered, shared) -> Path:
    """A build folder with the demo images, both splits, as float32 [3, 400, 400]."""
    start = ("harness", "preprocess", demo_surgered, "--dataset", "demo", "--build-dir")
    return once(shared / "demo", lambda folder: command(*start, folder))


@pytest.fixture(scope="session")
def demo_cache(demo_surgered, demo_build, shared) -> Path:
    """The demo detector's calibration on all 64 images, as it is by default."""
    images = demo_build / "preprocessed_data" / "demo-cal" / "float32_400x400"

    def calibrate(path):
        done = command("engine", "calibrate", demo_surgered, "--data", images, "-o", path)
        assert "41 scales from 64 images by auto" in " ".join(done.stdout.split())

    return once(shared / "demo.cache.json", calibrate)


@pytest.fixture(scope="session")
def demo_int8(demo_surgered, demo_cache, shared) -> Path:
    """The demo detector in INT8."""
    return once(
        shared / "demo.int8.onnx",
        lambda path: command("engine", "quantize", demo_surgered, demo_cache, path),
    )


@pytest.fixture(scope="session")
def demo_result(demo_surgered, demo_build, shared) -> Path:
    """The result.json of the demo detector's accuracy run, FP32 on a CPU, with two pictures."""
    options = ["--scenarios", "Offline", "--test_mode", "AccuracyOnly", "--pictures", "2"]
    options += ["--dataset", "demo", "--build-dir", demo_build, "--log-dir"]
    logs = once(
        shared / "demo-logs", lambda path: command("harness", "run", demo_surgered, *options, path)
    )
    (path,) = logs.rglob("result.json")
    return path

"""What works on this machine: each probe loads one part of the project and tries it.

A probe may end its process (a library that aborts) or hang (a driver that does not answer), so each
runs in a process of its own: ``python -m harness.doctor.probes NAME`` prints the fields of `Found`
or `Gpus` as one line of JSON. When the part does not work, that is ``{"error": "why"}`` instead,
and the exit code is 1.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

from engine.errors import EngineError
from engine.support.processor import CPUINFO, int8_instructions
from plugin_cuda.errors import PluginError


@dataclass(frozen=True)
class Found:
    """A part that works.

    Attributes
    ----------
    detail
        Versions and paths, for people.
    limit
        What of it does not work; None: all works.
    """

    detail: str
    limit: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU; `memory_bytes` is all that it has."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Gpus:
    """The GPUs, and the newest CUDA that their driver runs, as ``13.0``."""

    cuda: str
    devices: tuple[Gpu, ...]


def gpus() -> Gpus:
    """List the GPUs through the CUDA bindings.

    Raises
    ------
    EngineError
        When the bindings are missing, or the driver is missing or refuses.
    """
    from engine.backends.cuda import check, runtime

    cuda = runtime()
    version = check(cuda.cudaDriverGetVersion())
    devices = []
    for index in range(check(cuda.cudaGetDeviceCount())):
        properties = check(cuda.cudaGetDeviceProperties(index))
        name = properties.name.rstrip(b"\0").decode()
        capability = f"{properties.major}.{properties.minor}"
        devices.append(Gpu(name, capability, properties.totalGlobalMem))
    return Gpus(f"{version // 1000}.{version % 1000 // 10}", tuple(devices))


def loadgen() -> Found:
    """Import what ``harness`` preprocesses, runs and evaluates with."""
    return _import("mlperf_loadgen", "cv2", "pycocotools.mask")


def export() -> Found:
    """Import what ``export-onnx`` needs."""
    return _import("torch", "onnxscript", "safetensors")


def onnxruntime_cpu() -> Found:
    """Run a model of one operator in ONNX Runtime on the CPU; say what INT8 gains there."""
    found = _run_onnx("cpu")
    return replace(found, detail=f"{found.detail}; {int8_on_cpu(CPUINFO)}")


def int8_on_cpu(cpuinfo: Path) -> str:
    """What ``engine quantize --target cpu`` gains, by the processor's instructions."""
    if name := int8_instructions(cpuinfo):
        return f"{name}: INT8 by 'engine quantize --target cpu' is faster than FP32"
    return "neither VNNI nor AMX: INT8 may be no faster than FP32 (not measured)"


def onnxruntime_cuda() -> Found:
    """Run it with the CUDA provider."""
    return _run_onnx("cuda")


def cudnn() -> Found:
    """Ask cuDNN for kernels of a small INT8 layer.

    Raises
    ------
    EngineError
        When cuDNN, its frontend or a GPU is missing, or it has none for this GPU.
    """
    from engine.backends.cuda import use_gpu
    from engine.backends.cudnn.graph import Window
    from engine.backends.cudnn.plans import ConvShape, choices, import_cudnn

    module = import_cudnn()
    use_gpu(0)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    shape = ConvShape(1, 64, 32, 32, 64, window, "int8", "int8", residual=True, relu=True)
    choices(module, module.create_handle(), shape, every=False)
    return Found(f"cuDNN {module.backend_version_string()}, frontend {module.__version__}")


def tensorrt() -> Found:
    """Look for TensorRT's parts, build a model of one convolution, and load the engine.

    Raises
    ------
    EngineError
        When its bindings or a GPU are missing (without one, its builder ends the process), or it
        cannot build.
    """
    from engine.backends.cuda import use_gpu
    from engine.backends.tensorrt.module import import_tensorrt
    from engine.backends.tensorrt.parts import find_parts

    trt = import_tensorrt("tensorrt")
    try:
        capability, no_gpu = use_gpu(0).compute_capability, None
    except EngineError as error:
        capability, no_gpu = None, error
    parts = find_parts(trt, capability)
    if no_gpu is not None:
        raise EngineError(f"{no_gpu}; {'; '.join((*parts.found, *parts.lacking))}")
    limits = [*parts.lacking, *filter(None, [_build_and_load("tensorrt").limit])]
    return Found("; ".join(parts.found), "; ".join(limits) or None)


def tensorrt_rtx() -> Found:
    """Build it with TensorRT-RTX, which takes no GPU, and load the engine, which does."""
    return _build_and_load("tensorrt-rtx")


def triton() -> Found:
    """Import the client of Triton servers."""
    return _import("tritonclient.grpc")


def toolchain() -> Found:
    """Find what build-plugin needs.

    Raises
    ------
    PluginError
        When there is no nvcc, CMake or C++ compiler.
    """
    from plugin_cuda.toolchain import find_cmake, find_nvcc, find_tensorrt_headers, search_path

    nvcc, cmake = find_nvcc(), find_cmake()
    if shutil.which("c++", path=search_path()) is None:
        raise PluginError("no C++ compiler (c++) found, which nvcc needs; install g++")
    headers = find_tensorrt_headers()
    return Found(
        f"nvcc {nvcc.version} ({nvcc.path}), {cmake}"
        + (f", TensorRT {headers.version} headers" if headers else ""),
        None if headers else "no TensorRT plugin: set TENSORRT_INCLUDE_DIR to TensorRT's headers",
    )


def kernels() -> Found:
    """Load libnms_opt.so.

    Raises
    ------
    PluginError
        When it is missing or cannot be loaded.
    """
    from plugin_cuda.library import library_path, load_library

    load_library()
    return Found(str(library_path()))


def trt_plugin() -> Found:
    """Load the TensorRT plugin, without TensorRT.

    Raises
    ------
    PluginError
        When it is missing or is no plugin library.
    OSError
        When it cannot be loaded.
    """
    from engine.backends.tensorrt.plugins import headers_version
    from plugin_cuda.build import PLUGIN
    from plugin_cuda.library import library_path

    path = library_path().with_name(PLUGIN)
    if not path.is_file():
        raise PluginError(f"{path} not found")
    if not hasattr(ctypes.CDLL(str(path.resolve())), "getCreators"):
        raise PluginError(f"{path} exports no getCreators, so it is no plugin library")
    headers = headers_version(path)
    return Found(f"{path}, built with the headers of TensorRT {headers or 'of no known version'}")


def _import(*modules: str) -> Found:
    versions = []
    for name in modules:
        try:
            module = import_module(name)
        except (ImportError, OSError) as error:  # OSError: its libraries cannot be loaded
            raise EngineError(f"import {name}: {error}") from error
        versions.append(f"{name} {getattr(module, '__version__', '')}".rstrip())
    return Found(", ".join(versions))


def _relu_model(folder: str) -> Path:
    """Write an ONNX file of one ReLU, float32 [N, 3, 8, 8], with the input ``image``."""
    import onnx
    import onnx.parser

    path = Path(folder, "relu.onnx")
    shape = "float[batch,3,8,8]"
    head = '<ir_version: 10, opset_import: ["": 18]>'  # the export's
    body = f"relu ({shape} image) => ({shape} positive) {{ positive = Relu (image) }}"
    onnx.save(onnx.parser.parse_model(f"{head} {body}"), path)
    return path


def _run_onnx(device: str) -> Found:
    import numpy as np

    from engine.backends.onnxruntime.session import find_provider, open_session

    with tempfile.TemporaryDirectory() as folder:
        model = _relu_model(folder)
        provider = find_provider(model, device)
        session = open_session(model, model, provider, {}, 1)
        image = np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8)
        (positive,) = session.run(None, {"image": image})
    if not np.array_equal(positive, np.maximum(image, 0)):
        raise EngineError(f"{provider} computes a ReLU wrongly")
    return Found(f"{_version('onnxruntime')}, {provider}")


def _build_and_load(backend: str) -> Found:
    from engine.backends.cuda import use_gpu
    from engine.backends.tensorrt.log import polygraphy_log
    from engine.backends.tensorrt.module import import_tensorrt
    from engine.backends.tensorrt.plan import PlanRequest, build_plan

    trt = import_tensorrt(backend)
    shape = (1, 3, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        model = _relu_model(folder)
        shapes = (shape, shape, shape)
        plan = build_plan(
            trt, backend, PlanRequest(model, "image", shapes, {}, {}, False, None, "error")
        )
    try:
        use_gpu(0)
    except EngineError as error:
        return Found(str(trt.__version__), f"builds, but cannot run: {error}")
    from polygraphy.backend.trt import get_trt_logger

    with polygraphy_log("error") as errors:
        engine = trt.Runtime(get_trt_logger()).deserialize_cuda_engine(plan)
    if engine is None:
        return Found(str(trt.__version__), f"builds, but cannot run: {errors.first('no cause')}")
    return Found(str(trt.__version__))


def _version(module: str) -> str:
    return f"{module} {import_module(module).__version__}"


PROBES: dict[str, Callable[[], Found | Gpus]] = {
    "gpus": gpus,
    "loadgen": loadgen,
    "export": export,
    "onnxruntime-cpu": onnxruntime_cpu,
    "onnxruntime-cuda": onnxruntime_cuda,
    "cudnn": cudnn,
    "tensorrt": tensorrt,
    "tensorrt-rtx": tensorrt_rtx,
    "triton": triton,
    "toolchain": toolchain,
    "kernels": kernels,
    "trt-plugin": trt_plugin,
}
"""Names that the command line takes."""


def main() -> None:
    """Run the probe that the command line names."""
    try:
        found = PROBES[sys.argv[1]]()
    except (EngineError, PluginError, OSError) as error:
        print(json.dumps({"error": " ".join(str(error).split())}))  # noqa: T201
        sys.exit(1)
    print(json.dumps(asdict(found)))  # noqa: T201


if __name__ == "__main__":
    main()

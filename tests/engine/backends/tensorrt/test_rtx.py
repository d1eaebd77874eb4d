"""TensorRT-RTX parses and builds for real, ahead of time, without a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine.backends.cuda import Gpu
from engine.backends.tensorrt.build import BuildOptions, build
from engine.backends.tensorrt.log import polygraphy_log
from engine.backends.tensorrt.module import RTX, import_tensorrt
from engine.backends.tensorrt.plugins import load_plugins
from engine.errors import EngineError
from engine.load import load_engine
from engine.manifest import load_manifest
from engine.model import load_detector
from plugin_cuda.library import load_library
from tests.support import ROOT
from tests.support.calibrated import write_surgered
from tests.support.graphs import nms_node
from tests.support.int8_models import write_int8
from tests.support.rtx_plans import check_plan, edited

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None or find_spec("polygraphy") is None,
    reason="needs TensorRT-RTX: pip install 'ssd-resnet34-trt[rtx]'",
)

TARGETS = ("8.0", "8.6", "8.9", "12.0")


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def int8(demo_surgered, tmp_path_factory):
    """The demo detector in INT8 and FP16, with made-up scales."""
    return write_int8(demo_surgered, tmp_path_factory.mktemp("int8") / "d.int8.onnx", "fp16")


@pytest.fixture(scope="module")
def full_int8(tmp_path_factory):
    """The MLPerf network, 1200x1200, random weights, INT8 and FP16."""
    from export.config import SSDConfig
    from export.model import SSDResNet34
    from export.onnx_export import Detector, export_detector, without_heads

    folder = tmp_path_factory.mktemp("full")
    onnx.save(without_heads(export_detector(Detector(SSDResNet34(SSDConfig())))), folder / "f.onnx")
    return write_int8(
        write_surgered(folder / "f.onnx", folder / "f.nms.onnx"), folder / "f.int8", "fp16"
    )


def parse(model):
    from polygraphy.backend.trt import NetworkFromOnnxPath

    return NetworkFromOnnxPath(str(model), strongly_typed=True)()


def check_plugin_layer(trt, model):
    """One PLUGIN_V3 layer with the node's inputs; INT8 in, detections out."""
    _, network, _ = parse(model)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    (layer,) = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    node = nms_node(onnx.load(model))
    assert layer.num_inputs == len(node.input)
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    assert [tensor.name for tensor in outputs] == list(node.output)
    assert [tensor.dtype for tensor in outputs] == [trt.DataType.FLOAT, trt.DataType.INT32]
    keep_top_k = next(a.i for a in node.attribute if a.name == "keepTopK")
    assert [tuple(tensor.shape) for tensor in outputs] == [(-1, keep_top_k, 7), (-1,)]
    assert network.get_input(0).dtype == trt.DataType.INT8
    assert layers[-1].type == trt.LayerType.PLUGIN_V3
    assert trt.LayerType.NMS not in [layer.type for layer in layers]


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), TARGETS, ()])
def test_demo_model_builds_for_every_target(int8, plugin, kernels, tmp_path, targets):
    engine = tmp_path / "demo.engine"
    options = BuildOptions(opt_batch=8, max_batch=16, compute_capabilities=targets)
    built = build(load_detector(int8), RTX, engine, options)
    check_plan(engine.read_bytes(), int8, 16, kernels)
    assert load_manifest(engine) == built
    plan = engine.read_bytes()
    assert built.engine_sha256 == sha256(plan).hexdigest()
    assert built.onnx_sha256 == sha256(int8.read_bytes()).hexdigest()
    assert (built.gpu, built.compute_capabilities) == (None, targets)
    assert built.input.dtype == "int8"
    rows = onnx.load(int8).graph.output[0].type.tensor_type.shape.dim[1].dim_value
    assert built.keep_top_k == rows == 200
    assert built.outputs == {"detections": [rows, 7], "num_detections": []}
    assert len(plan) > 4_000_000  # the INT8 weights are in it


def test_full_model_builds_for_every_target(full_int8, plugin, kernels, trt, tmp_path):
    check_plugin_layer(trt, full_int8)
    engine = tmp_path / "full.engine"
    built = build(load_detector(full_int8), RTX, engine, BuildOptions(compute_capabilities=TARGETS))
    check_plan(engine.read_bytes(), full_int8, 64, kernels)
    assert built.input.shape == (3, 1200, 1200)
    assert built.engine_bytes > 20_000_000
    assert built.metadata["float_type"] == "fp16"


def test_node_becomes_a_plugin_layer(int8, plugin, trt):
    check_plugin_layer(trt, int8)


def test_float_model_builds(demo_surgered, plugin, tmp_path):
    built = build(
        load_detector(demo_surgered),
        RTX,
        tmp_path / "d.engine",
        BuildOptions(compute_capabilities=TARGETS),
    )
    assert built.input.dtype == "float32"


def test_int8_heads_without_a_scale_are_refused(int8, plugin, tmp_path):
    """A strongly typed graph gives the plugin INT8 values, but not what they stand for."""
    model = onnx.load(int8)
    node = nms_node(model)
    position = list(model.graph.node).index(node)
    for value, name in ((np.float16(0.125), "step"), (np.int8(0), "zero")):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    for i in range(6, 12):
        inputs = [node.input[i], "step", "zero"]
        quantize = onnx.helper.make_node("QuantizeLinear", inputs, [f"int8_{i}"])
        model.graph.node.insert(position, quantize)
        node.input[i] = f"int8_{i}"
    onnx.save(model, tmp_path / "q.onnx")
    with pytest.raises(EngineError, match="Failed to find any supported plugin"):
        build(load_detector(tmp_path / "q.onnx"), RTX, tmp_path / "q.engine", BuildOptions())


def test_options_reach_the_builder(int8, plugin, trt, tmp_path, monkeypatch):
    """Read the builder configuration that TensorRT was called with."""
    from polygraphy.backend import tensorrt_rtx
    from polygraphy.backend import trt as polygraphy_trt

    seen = []
    loader = polygraphy_trt.EngineBytesFromNetwork

    def spy(network, config, **others):
        seen.append(config())
        return loader(network, config=config, **others)

    def spy_of_config(profiles, **others):
        ranges.append(dict(profiles[0]))
        return create_config(profiles=profiles, **others)

    ranges, create_config = [], tensorrt_rtx.CreateConfigRTX
    monkeypatch.setattr(polygraphy_trt, "EngineBytesFromNetwork", spy)
    monkeypatch.setattr(tensorrt_rtx, "CreateConfigRTX", spy_of_config)
    options = BuildOptions(
        min_batch=2,
        opt_batch=3,
        max_batch=4,
        memory_pools={"workspace": 1 << 28},
        optimization_level=2,
        tf32=True,
        compute_capabilities=("8.9",),
    )
    built = build(load_detector(int8), RTX, tmp_path / "a.engine", options)
    build(load_detector(int8), RTX, tmp_path / "b.engine", BuildOptions(max_batch=4))
    config, plain = seen
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    assert config.builder_optimization_level == 2
    assert config.get_flag(trt.BuilderFlag.TF32)
    assert not plain.get_flag(trt.BuilderFlag.TF32)
    batches = [[shape[0] for shape in shapes["image"]] for shapes in ranges]
    assert batches == [[2, 3, 4], [1, 4, 4]]
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    assert built.options == {
        "memory_pools": {"workspace": 1 << 28},
        "optimization_level": 2,
        "tf32": True,
    }


@pytest.fixture
def as_tensorrt(trt, monkeypatch):
    """The path of backend ``tensorrt``, with TensorRT-RTX and a GPU that is not there."""
    monkeypatch.setattr("engine.backends.tensorrt.build.import_tensorrt", lambda _: trt)
    gpu = Gpu("NVIDIA Stand-in", "8.9")
    monkeypatch.setattr("engine.backends.cuda.use_gpu", lambda _: gpu)


def test_path_of_plain_tensorrt(int8, plugin, as_tensorrt, tmp_path):
    cache = tmp_path / "timing.cache"
    options = BuildOptions(max_batch=4, timing_cache=cache, hardware_compatible=True)
    built = build(load_detector(int8), "tensorrt", tmp_path / "d.engine", options)
    assert (built.backend, built.gpu) == ("tensorrt", "NVIDIA Stand-in")
    assert built.compute_capabilities == ("8.9",)
    assert built.options == {"timing_cache": str(cache), "hardware_compatible": True}


def test_what_the_builder_refuses_is_one_line(int8, plugin, as_tensorrt, tmp_path):
    """The wheel of TensorRT-RTX lacks the lean runtime that such a plan needs."""
    options = BuildOptions(max_batch=4, version_compatible=True)
    with pytest.raises(
        EngineError, match=r"--version-compatible needs .* libnvinfer_lean"
    ) as caught:
        build(load_detector(int8), "tensorrt", tmp_path / "d.engine", options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_progress_is_shown_on_a_terminal_only(int8, plugin, tmp_path, monkeypatch, capfd):
    options = BuildOptions(max_batch=2, compute_capabilities=("8.9",))
    build(load_detector(int8), RTX, tmp_path / "d.engine", options)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    build(load_detector(int8), RTX, tmp_path / "d.engine", options)
    shown = capfd.readouterr()
    assert "Building engine" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capabilities": ("9.0",)}, r"cannot build for '9\.0'; choose from: 7\.5, 8\.0"),
        ({"compute_capabilities": ("89",)}, "cannot build for '89'"),
        ({"memory_pools": {"heap": 1}}, "no memory pool 'heap' in this TensorRT; choose one of"),
    ],
)
def test_values_that_this_release_does_not_know(int8, plugin, tmp_path, options, message):
    with pytest.raises(EngineError, match=message):
        build(load_detector(int8), RTX, tmp_path / "d.engine", BuildOptions(**options))
    assert not list(tmp_path.iterdir())


def test_plugin_is_not_registered(int8, trt, tmp_path):
    with pytest.raises(EngineError, match=r"plugin NMS_OPT_TRT \(version 1\) is not registered"):
        build(load_detector(int8), RTX, tmp_path / "d.engine", BuildOptions())


def test_node_that_does_not_ask_for_the_plugin(int8, plugin, tmp_path, kernels):
    """TensorRT-RTX takes the definition then, if it sees one."""
    model = onnx.load(int8)
    node = nms_node(model)
    kept = [a for a in node.attribute if a.name != "plugin_namespace"]
    node.ClearField("attribute")
    node.attribute.extend(kept)
    onnx.save(model, tmp_path / "d.onnx")
    build(load_detector(tmp_path / "d.onnx"), RTX, tmp_path / "d.engine", BuildOptions(max_batch=4))
    check_plan((tmp_path / "d.engine").read_bytes(), int8, 4, kernels)


def test_what_the_parser_refuses_is_one_line(int8, plugin, tmp_path):
    """An asymmetric zero point, which TensorRT does not take."""
    model = onnx.load(int8)
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    zero_point = onnx.numpy_helper.from_array(np.array(3, np.int8), "three")
    model.graph.initializer.append(zero_point)
    for node in model.graph.node:
        if node is quantize or node.input[0] == quantize.output[0]:
            node.input[2:] = ["three"]
    onnx.save(model, tmp_path / "d.onnx")
    with pytest.raises(
        EngineError, match=r"d\.onnx: tensorrt-rtx cannot parse it: .*QuantizeLinear.*[zZ]ero point"
    ) as caught:
        build(load_detector(tmp_path / "d.onnx"), RTX, tmp_path / "d.engine", BuildOptions())
    assert "\n" not in str(caught.value)


def test_loading_needs_a_gpu(int8, plugin, tmp_path):
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if cuda.cudaGetDeviceCount()[1]:
        pytest.skip("there is a GPU")
    engine = tmp_path / "d.engine"
    build(load_detector(int8), RTX, engine, BuildOptions(max_batch=2))
    with pytest.raises(EngineError, match=r"no CUDA device 0 can be used: CUDA: .* driver"):
        load_engine(RTX, engine, device="cuda")


def engine_build(model, library, output, *options):
    """The command that users call."""
    command = [sys.executable, "-m", "engine", "build", model, "--backend", RTX, "-o", output]
    return subprocess.run(
        [*command, "--plugin", library, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_command_builds_with_the_library(int8, trt_plugin_library, kernels, tmp_path):
    """Values that no default has arrive in the plan, too."""
    others = {"topK": 123, "keepTopK": 77, "confidenceThreshold": 0.0625, "nmsThreshold": 0.25}
    model = edited(int8, tmp_path / "other.onnx", **others)
    engine = tmp_path / "other.engine"
    targets = [part for target in TARGETS for part in ("--compute-capability", target)]
    done = engine_build(model, trt_plugin_library, engine, "--max-batch", "16", *targets)
    assert done.returncode == 0, done.stderr
    check_plan(engine.read_bytes(), model, 16, kernels)
    assert (
        load_manifest(engine).plugins[0].sha256
        == sha256(trt_plugin_library.read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"topK": 2000}, "attribute topK = 2000 is not in 1..1024"),
        ({"confSigmoid": 1}, "confSigmoid = 1 and confSoftmax = 1: exactly one must be 1"),
        ({"nmsThreshold": 1}, "attribute nmsThreshold has the field type 5, expected 1 (FLOAT32)"),
        ({"inputOrder": [0, 6]}, "attribute inputOrder has 2 values, expected 3"),
        ({"numClasses": 5}, "conf_0 has 324 channels, expected 20: 4 anchors, as loc_0 has"),
    ],
)
def test_command_shows_what_the_plugin_refuses(
    int8, trt_plugin_library, tmp_path, attributes, message
):
    model = edited(int8, tmp_path / "bad.onnx", **attributes)
    done = engine_build(model, trt_plugin_library, tmp_path / "bad.engine")
    assert done.returncode == 2
    assert "NMS_OPT_TRT: " in done.stderr
    assert message in done.stderr
    assert re.search(r"^engine: error: .*bad\.onnx: tensorrt-rtx cannot ", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad.engine").exists()


def test_error_of_the_plugin_is_the_cause():
    """Where TensorRT hands its logger to plugins, its own errors stand around theirs."""
    from polygraphy.logger import G_LOGGER

    cause = "NMS_OPT_TRT: attribute topK = 0 is not in 1..1024"
    with polygraphy_log("error") as errors:
        for text in ("before", cause, "after"):
            G_LOGGER.error(text)
    assert errors.first("?") == errors.last("?") == cause


POLYGRAPHY_SCRIPT = """
import tensorrt_rtx as trt
from polygraphy.backend.trt import NetworkFromOnnxPath

def load_network():
    assert trt.get_plugin_registry().load_library({library!r})
    return NetworkFromOnnxPath({model!r}, strongly_typed=True)()
"""


def test_polygraphy_command_line(int8, trt_plugin_library, kernels, tmp_path):
    """Its --plugins registers nothing; a script that makes the network loads the library first."""
    links = tmp_path / "links"  # the wheel of TensorRT-RTX lacks the name that its parser opens
    links.mkdir()
    folder = Path(find_spec("tensorrt_rtx_libs").submodule_search_locations[0])
    (links / "libtensorrt_rtx.so").symlink_to(folder / "libtensorrt_rtx.so.1")
    script, engine = tmp_path / "network.py", tmp_path / "p.engine"
    names = {"library": str(trt_plugin_library), "model": str(int8)}
    script.write_text(POLYGRAPHY_SCRIPT.format(**names))
    command = [Path(sys.executable).with_name("polygraphy"), "convert"]
    rest = ["--convert-to", "trt", "-o", engine, "--strongly-typed"]
    rest += ["--compute-capabilities", "8.9"]
    for bound, batch in {"min": 1, "opt": 4, "max": 8}.items():
        rest += [f"--trt-{bound}-shapes", f"image:[{batch},3,400,400]"]
    run = functools.partial(
        subprocess.run,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "LD_LIBRARY_PATH": str(links)},
    )
    done = run([*command, int8, "--plugins", trt_plugin_library, *rest])
    assert "has no runners that implement it" in done.stdout + done.stderr  # the function's body
    assert not engine.exists()
    done = run([*command, script, "--model-type", "trt-network-script", *rest])
    assert done.returncode == 0, done.stderr
    check_plan(engine.read_bytes(), int8, 8, kernels)


def test_library_without_creators_for_this_tensorrt(trt, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "empty.c", tmp_path / "empty.so"
    source.write_text(
        "void* const* getCreators(int* n) { *n = 0; return 0; }\n"
        "void setLoggerFinder(void* finder) { (void)finder; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.raises(EngineError, match="registered none of its plugins"):
        load_plugins(trt, [library])


def test_library_is_named_without_a_trace():
    """The folder of links is gone with the process, and the environment is as it was."""
    script = (
        "import os; before = dict(os.environ)\n"
        "from engine.backends.tensorrt import module as m\n"
        "m.import_tensorrt('tensorrt-rtx'); m.import_tensorrt('tensorrt-rtx')\n"
        "assert dict(os.environ) == before\n"
        "print(*[links.name for links in m._links])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.count("tensorrt-rtx-") <= 1  # 0 once the wheel has the name itself
    for folder in done.stdout.split():
        assert not Path(folder).exists()


def test_package_was_imported_too_early():
    script = (
        "import pathlib, tensorrt_rtx_libs\n"
        "folder = pathlib.Path(tensorrt_rtx_libs.__file__).parent\n"
        "if (folder / 'libtensorrt_rtx.so').exists(): raise SystemExit(3)\n"
        "from engine.backends.tensorrt.module import EngineError, import_tensorrt\n"
        "try: import_tensorrt('tensorrt-rtx')\n"
        "except EngineError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode == 3:
        pytest.skip("this wheel has the name")
    assert "before the engine could put its library names right" in done.stdout, done.stderr


def test_one_process_uses_one_of_the_two(trt, monkeypatch):
    import polygraphy.backend.trt  # noqa: F401

    class Other:
        __version__ = "10.16.1"

    monkeypatch.setitem(sys.modules, "tensorrt", Other)
    with pytest.raises(EngineError, match="TensorRT or TensorRT-RTX, not both"):
        import_tensorrt("tensorrt")
    Other.__version__ = "10.5.0"
    with pytest.raises(EngineError, match=r"tensorrt 10\.5\.0 is too old: 10\.6 or later"):
        import_tensorrt("tensorrt")

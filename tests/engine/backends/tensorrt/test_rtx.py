"""TensorRT-RTX parses and builds for real, ahead of time, without a GPU."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import onnx
import pytest

from engine.backends.cuda import Gpu
from engine.backends.tensorrt.build import build, wanted_plugin
from engine.backends.tensorrt.module import RTX
from engine.backends.tensorrt.options import BuildOptions
from engine.errors import EngineError
from engine.load import load_engine
from engine.manifest import load_manifest
from engine.model import load_detector
from graph_surgery.replace import insert_nms
from tests.support.calibrated import write_surgered
from tests.support.graphs import nms_node
from tests.support.int8_models import write_int8
from tests.support.retina_graphs import Retina, retina
from tests.support.rtx_plans import NEEDS_RTX, TARGETS, check_plan

pytestmark = NEEDS_RTX


@pytest.fixture(scope="module")
def full_int8(tmp_path_factory):
    """The MLPerf network, 1200x1200, random weights, INT8 and FP16."""
    from export.onnx_export import Detector, export_detector, without_heads
    from export.ssd_resnet34.config import SSDConfig
    from export.ssd_resnet34.model import SSDResNet34

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


@pytest.fixture(scope="module", params=["fp32", "int8"])
def retinanet(request, tmp_path_factory):
    """A small RetinaNet: NMS_OPT_TRT of version 2."""
    folder = tmp_path_factory.mktemp("retina")
    onnx.save(insert_nms(retina(Retina(height=64, width=64))).model, folder / "r.nms.onnx")
    if request.param == "fp32":
        return folder / "r.nms.onnx"
    return write_int8(folder / "r.nms.onnx", folder / "r.int8.onnx", "fp16")


def test_a_retinanet_builds_with_its_own_version_of_the_plugin(
    retinanet, plugin, kernels, trt, tmp_path
):
    assert wanted_plugin(load_detector(retinanet)).version == "2"
    engine = tmp_path / "r.engine"
    options = BuildOptions(max_batch=16, compute_capabilities=TARGETS)
    built = build(load_detector(retinanet), RTX, engine, options)
    check_plan(engine.read_bytes(), retinanet, 16, kernels)
    assert (built.keep_top_k, built.first_label) == (Retina.keep, 0)


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

"""What `engine build` and loading an engine settle before TensorRT is needed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from engine.backends.tensorrt.build import Plugin, build, check_volumes, wanted_plugin
from engine.backends.tensorrt.options import BuildOptions, options_of, set_options
from engine.errors import EngineError
from engine.load import load_engine
from engine.manifest import (
    Machine,
    check_engine,
    check_machine,
    check_plugins,
    load_manifest,
    manifest_path,
    plugin_library,
    save_engine,
)
from engine.model import Detector, load_detector
from engine.protocol import InputSpec
from tests.support.int8_models import write_int8
from tests.support.manifests import PLAN, manifest

HERE = Machine("tensorrt", "10.16.1.11", "NVIDIA H100 80GB HBM3", "9.0")


def edited(path, change):
    model = onnx.load(path)
    change(model)
    return model


NOTHING = Detector(Path("m.onnx"), onnx.ModelProto())


# The detector


@pytest.mark.parametrize("float_type", ["fp32", "fp16"])
def test_detector_of_a_quantised_file(surgered, tmp_path, float_type):
    path = write_int8(surgered, tmp_path / "int8.onnx", float_type)
    detector = load_detector(path)
    assert detector.input == InputSpec("image", (3, 400, 400), "int8", 1 / 16)
    assert wanted_plugin(detector) == Plugin("1", "", 200)
    assert detector.metadata["calibration_method"] == "entropy"


def test_a_batch_with_2_to_the_31_values_in_a_tensor(demo_surgered, tmp_path):
    """The stem makes 16 channels of 200x200: 3,355 images are below, 3,356 are not."""
    detector = load_detector(demo_surgered)
    with pytest.raises(EngineError, match=r"640,000 values an image, .*: --max-batch 3355 at most"):
        build(detector, "tensorrt", tmp_path / "e", BuildOptions(max_batch=3356))
    check_volumes(detector, 3355)


@pytest.mark.parametrize(("name", "value"), [("plugin_version", 3), ("keepTopK", "many")])
def test_attributes_of_another_type(surgered, tmp_path, name, value):
    def change(model):
        node = next(node for node in model.graph.node if node.op_type == "NMS_OPT_TRT")
        node.attribute.remove(next(one for one in node.attribute if one.name == name))
        node.attribute.append(onnx.helper.make_attribute(name, value))

    path = tmp_path / "model.onnx"
    onnx.save(edited(surgered, change), path)
    with pytest.raises(EngineError, match=r"model\.onnx: .* are not text, text and a whole number"):
        wanted_plugin(load_detector(path))


def test_model_without_the_node(exported, tmp_path):
    with pytest.raises(EngineError, match=r"no NMS_OPT_TRT node; run 'graph-surgery nms'"):
        build(load_detector(exported), "tensorrt-rtx", tmp_path / "e.engine", BuildOptions())


def fix_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def make_double(model):
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8


def forget_scale(model):
    del model.metadata_props[:]


def add_output(model):
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[-1].name = model.graph.node[0].output[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fix_batch, "batch of input 'image' is fixed at 4"),
        (make_double, "is UINT8; float32 or int8 expected"),
        (forget_scale, "without the metadata 'input_scale'"),
        (add_output, "and no others expected"),
    ],
)
def test_unusable_detectors(surgered, tmp_path, change, message):
    path = write_int8(surgered, tmp_path / "int8.onnx", "fp32")
    detector = Detector(path, edited(path, change))  # not all are valid ONNX
    with pytest.raises(EngineError, match=message):
        build(detector, "tensorrt-rtx", tmp_path / "e.engine", BuildOptions())


def test_not_an_onnx_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08" * 40)
    with pytest.raises(EngineError, match=r"m\.onnx: "):
        load_detector(path)
    with pytest.raises(EngineError, match="cannot read"):
        load_detector(tmp_path / "none.onnx")


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_batch": 0}, "--min-batch 0, --opt-batch 64, --max-batch 64"),
        ({"opt_batch": 9, "max_batch": 8}, "--opt-batch 9, --max-batch 8"),
        ({"min_batch": 3, "opt_batch": 2}, "--min-batch 3, --opt-batch 2"),
        ({"optimization_level": 6}, "--optimization-level 6"),
        (
            {"device": 0, "compute_capabilities": ("8.9",)},
            "--device or --compute-capability, not both",
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(EngineError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("tensorrt-rtx", {"timing_cache": Path("c")}, "tensorrt-rtx has no option --timing-cache"),
        ("tensorrt-rtx", {"version_compatible": True}, "no option --version-compatible"),
        (
            "tensorrt-rtx",
            {"hardware_compatible": True},
            "--hardware-compatible; give --compute-cap",
        ),
        ("tensorrt", {"compute_capabilities": ("9.0",)}, "no option --compute-capability;"),
        ("tensorrt-rtx", {"refit": True}, "needs a GPU for the option --refit"),
        ("tensorrt-rtx", {"strip_plan": True}, "needs a GPU for the option --strip-plan"),
        ("tensorrt-rtx", {"layer_info": Path("l.json")}, "needs a GPU for the option --layer-info"),
        ("onnxruntime", {}, "no engine can be built for 'onnxruntime'"),
    ],
)
def test_options_that_a_backend_lacks(tmp_path, backend, options, message):
    with pytest.raises(EngineError, match=message):
        build(NOTHING, backend, tmp_path / "e.engine", BuildOptions(**options))


@pytest.mark.parametrize(
    ("given", "again"),
    [
        ({}, {}),
        ({"tf32": True, "refit": True}, {"tf32": True, "refit": True}),
        ({"strip_plan": True}, {"refit": True}),  # a plan without weights would not run
    ],
)
def test_the_like_of_an_engine_computes_as_it(given, again, tmp_path):
    """A plan that may be refitted has other kernels than one whose weights are fixed."""
    known = manifest(options=set_options(BuildOptions(**given)))
    expected = BuildOptions(min_batch=1, opt_batch=8, max_batch=16, **again)
    assert options_of(tmp_path / "plan.engine", known) == expected


def test_output_folder_is_missing(tmp_path):
    with pytest.raises(EngineError, match=r"no such folder to write e\.engine to"):
        build(NOTHING, "tensorrt", tmp_path / "no" / "e.engine", BuildOptions())


@pytest.mark.parametrize(
    ("backend", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")]
)
def test_tensorrt_is_not_installed(surgered, tmp_path, monkeypatch, backend, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=f"'{backend}' needs {module}: pip install") as caught:
        build(load_detector(surgered), backend, tmp_path / "e.engine", BuildOptions())
    assert "\n" not in str(caught.value)
    save_engine(tmp_path / "e.engine", PLAN, manifest(backend=backend))
    with pytest.raises(EngineError, match=f"needs {module}: pip install"):
        load_engine(backend, tmp_path / "e.engine", device="cuda")


# The manifest


def test_manifest_round_trip(tmp_path):
    engine = tmp_path / "m.engine"
    library = tmp_path / "plugins" / "libnms.so"
    library.parent.mkdir()
    library.write_bytes(b"code")
    saved = manifest(plugins=(plugin_library(engine, library, "10.6.0"),), options={"tf32": True})
    save_engine(engine, PLAN, saved)
    assert load_manifest(engine) == saved
    assert check_engine(engine, saved) == PLAN
    assert check_plugins(engine, saved) == (library,)

    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    engine = moved / "m.engine"
    assert check_plugins(engine, load_manifest(engine)) == (moved / "plugins" / "libnms.so",)


def test_no_manifest(tmp_path):
    engine = tmp_path / "m.engine"
    with pytest.raises(EngineError, match="no such engine file"):
        load_manifest(engine)
    engine.write_bytes(PLAN)
    with pytest.raises(EngineError, match=r"no manifest m\.engine\.json beside it"):
        load_manifest(engine)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PLAN[:-1], "truncated: it has 27 bytes, its manifest says 28"),
        (PLAN + b".", "not the engine: it has 29 bytes"),
        (PLAN.upper(), "engine_sha256 of its manifest is another"),
        (b"", "truncated: it has 0 bytes"),
    ],
)
def test_engine_is_not_the_one_of_the_manifest(tmp_path, plan, message):
    engine = tmp_path / "m.engine"
    save_engine(engine, PLAN, manifest())
    engine.write_bytes(plan)
    with pytest.raises(EngineError, match=message):
        load_engine("tensorrt", engine, device="cuda")


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ({"backend": "tensorrt-rtx"}, "backend tensorrt-rtx, here it is tensorrt"),
        ({"version": "10.15.0.1"}, r"version 10\.15\.0\.1, here it is 10\.16\.1\.11"),
        (
            {"version": "11.4.0.106", "options": {"version_compatible": True}},
            r"version 11\.4\.0\.106, here",
        ),
        (
            {"version": "10.17.0.1", "options": {"version_compatible": True}},
            r"version 10\.17\.0\.1, here",
        ),
        ({"gpu": "NVIDIA H100 PCIe"}, "gpu NVIDIA H100 PCIe, here it is NVIDIA H100 80GB HBM3"),
        ({"gpu": "A100", "compute_capabilities": ("8.0",)}, "compute_capabilities 8.0, here"),
        (
            {"gpu": None, "compute_capabilities": ("8.0", "8.6", "8.9", "12.0")},
            "compute_capabilities 8.0, 8.6, 8.9, 12.0, here it is 9.0",
        ),
    ],
)
def test_engine_of_another_machine(built, message):
    with pytest.raises(EngineError, match=message):
        check_machine(Path("m.engine"), manifest(**built), HERE)


@pytest.mark.parametrize(
    "built",
    [
        {},
        {"version": "10.12.0.1", "options": {"version_compatible": True}},
        {
            "gpu": "A100",
            "compute_capabilities": ("8.0",),
            "options": {"hardware_compatible": True},
        },
        {"gpu": None, "compute_capabilities": ("8.9", "9.0")},
        {"gpu": None, "compute_capabilities": ()},
    ],
)
def test_engine_that_runs_here(built):
    check_machine(Path("m.engine"), manifest(**built), HERE)


def test_hardware_compatible_means_ampere_or_later():
    turing = replace(HERE, compute_capability="7.5")
    built = manifest(options={"hardware_compatible": True})
    with pytest.raises(EngineError, match=r"8\.0 or later, here it is 7\.5"):
        check_machine(Path("m.engine"), built, turing)


def test_plugin_library_of_an_engine(tmp_path):
    engine, library = tmp_path / "m.engine", tmp_path / "libnms.so"
    library.write_bytes(b"one")
    save_engine(engine, PLAN, manifest(plugins=(plugin_library(engine, library),)))
    library.write_bytes(b"two")
    with pytest.raises(EngineError, match="is not the one it was built with"):
        load_engine("tensorrt", engine, device="cuda")
    library.unlink()
    with pytest.raises(EngineError, match="is missing; build the plugin"):
        load_engine("tensorrt", engine, device="cuda")


def test_stripped_engine_and_wrong_device(tmp_path):
    engine = tmp_path / "m.engine"
    save_engine(engine, PLAN, manifest(options={"strip_plan": True}))
    with pytest.raises(EngineError, match=r"stripped; put weights into it with 'engine refit'"):
        load_engine("tensorrt", engine, device="cuda")
    save_engine(engine, PLAN, manifest(options={"weight_streaming": True}))  # of an older release
    with pytest.raises(EngineError, match="built with --weight-streaming"):
        load_engine("tensorrt", engine, device="cuda")
    save_engine(engine, PLAN, manifest())
    for device in ("cpu", "cuda:x", "cuda:", "tpu"):
        with pytest.raises(EngineError, match="runs on a GPU, not on"):
            load_engine("tensorrt", engine, device=device)


def test_unwritable_engine(tmp_path):
    (tmp_path / "m.engine").mkdir()
    with pytest.raises(EngineError, match="cannot write it"):
        save_engine(tmp_path / "m.engine", PLAN, manifest())
    assert not manifest_path(tmp_path / "m.engine").exists()
    assert not list(tmp_path.glob("*.tmp"))

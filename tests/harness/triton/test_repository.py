"""Model repositories for Triton, read back with Triton's own protobuf."""

from __future__ import annotations

import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from engine.errors import EngineError
from engine.load import load_engine
from engine.manifest import check_plugins, load_manifest, plugin_library, save_engine
from harness.cli.main import main
from harness.errors import HarnessError
from harness.loadgen.settings import SCENARIOS
from harness.triton.repository import write_repository
from tests.support.int8_models import write_int8
from tests.support.manifests import PLAN, manifest

pb = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]", exc_type=ImportError
)


def read_config(path: Path):
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), pb.ModelConfig())


@pytest.fixture(scope="module")
def int8(surgered, tmp_path_factory):
    return write_int8(surgered, tmp_path_factory.mktemp("int8") / "model.int8.onnx", "fp32")


@pytest.fixture
def engine(int8, tmp_path):
    """An engine file with its manifest and a plugin library, which nothing here loads.

    It claims to come from `int8`.
    """
    folder = tmp_path / "engines"
    folder.mkdir()
    (tmp_path / "plugins").mkdir()
    plugin = tmp_path / "plugins" / "libnmsoptplugin.so"
    plugin.write_bytes(b"a library")
    registering = plugin.with_name("libnmsoptplugin_register.so")
    registering.write_bytes(b"a library that registers the other")
    path = folder / "model.engine"
    said = manifest(
        onnx_sha256=sha256(int8.read_bytes()).hexdigest(),
        plugins=(plugin_library(path, plugin),),
        metadata={},
        input=load_engine("onnxruntime", int8).input_spec,
        opt_batch=16,
    )
    save_engine(path, PLAN, said)
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_an_onnx_file(backend, int8, tmp_path):
    write_repository(int8, tmp_path / "models", backend, max_batch=4, instances=2)
    folder = tmp_path / "models" / "ssd-resnet34"
    config = read_config(folder / "config.pbtxt")
    assert config.name == folder.name
    assert config.backend == backend
    assert config.max_batch_size == 4
    assert (folder / "1" / config.default_model_filename).is_file()
    copies = [path for path in (folder / "1").iterdir() if path.read_bytes() == int8.read_bytes()]
    assert len(copies) == 1

    model = onnx.load(int8)
    (image,) = config.input
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert (image.name, list(image.dims)) == (model.graph.input[0].name, dims[1:])
    assert image.data_type == pb.TYPE_INT8
    outputs = {output.name: output for output in config.output}
    assert set(outputs) == {value.name for value in model.graph.output}
    detections = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
    assert list(outputs["detections"].dims) == detections[1:]
    assert outputs["detections"].data_type == pb.TYPE_FP32
    assert outputs["num_detections"].data_type == pb.TYPE_INT32
    assert list(outputs["num_detections"].reshape.shape) == []

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert config.parameters["onnx_sha256"].string_value == sha256(int8.read_bytes()).hexdigest()
    assert float(config.parameters["input_scale"].string_value) == float(metadata["input_scale"])
    (group,) = config.instance_group
    assert group.count == 2
    assert sorted(warm_up.batch_size for warm_up in config.model_warmup) == [1, 4]
    for warm_up in config.model_warmup:
        assert list(warm_up.inputs[image.name].dims) == list(image.dims)


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_data_beside_an_onnx_file_is_copied(backend, int8, tmp_path):
    source = tmp_path / "model.onnx"
    onnx.save(onnx.load(int8), source, save_as_external_data=True, location="w.bin")
    write_repository(source, tmp_path / "models", backend, max_batch=4)
    folder = tmp_path / "models" / "ssd-resnet34"
    (copy,) = (folder / "1").glob("*.onnx")
    source.with_name("w.bin").unlink()
    image = np.ones((1, 3, 400, 400), np.int8)
    served, expected = (load_engine("onnxruntime", path) for path in (copy, int8))
    for one, other in zip(
        served.session().infer(image), expected.session().infer(image), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    stated = read_config(folder / "config.pbtxt").parameters["onnx_sha256"].string_value
    assert stated == served.manifest["onnx_sha256"] != expected.manifest["onnx_sha256"]


def test_an_onnx_file_on_cudnn(int8, tmp_path):
    write_repository(int8, tmp_path / "models", "python", engine="cudnn", reference=int8)
    config = read_config(tmp_path / "models" / "ssd-resnet34" / "config.pbtxt")
    assert [group.kind for group in config.instance_group] == [pb.ModelInstanceGroup.KIND_GPU]
    assert "cudnn" in {one.string_value for one in config.parameters.values()}


@pytest.mark.parametrize(
    ("backend", "named"), [("onnxruntime", "cudnn"), ("python", "tensorrt"), ("python", "none")]
)
def test_engines_of_onnx_files_that_are_refused(backend, named, int8, tmp_path):
    with pytest.raises(EngineError, match=f"--engine {named}: only with the backend python"):
        write_repository(int8, tmp_path / "models", backend, engine=named)


def test_each_scenario_has_its_batching(int8, tmp_path):
    write_repository(int8, tmp_path / "models", "onnxruntime", max_batch=32)
    folder = tmp_path / "models" / "ssd-resnet34" / "configs"
    configs = {path.stem: read_config(path) for path in folder.iterdir()}
    assert set(configs) == set(SCENARIOS)
    assert not configs["SingleStream"].HasField("dynamic_batching")
    batching = {name: configs[name].dynamic_batching for name in ("Offline", "Server")}
    assert all(list(one.preferred_batch_size) == [32] for one in batching.values())
    delay = {name: one.max_queue_delay_microseconds for name, one in batching.items()}
    assert 0 < delay["Server"] < delay["Offline"]
    assert delay["Server"] <= 10_000  # of the 100 ms that Server allows
    assert list(configs["MultiStream"].dynamic_batching.preferred_batch_size) == [8]
    default = read_config(folder.parent / "config.pbtxt")
    assert default.dynamic_batching.max_queue_delay_microseconds == 0


def test_a_tensorrt_engine(engine, int8, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("harness", "triton-repository", str(engine), "-o", str(tmp_path / "models")),
            *("--backend", "tensorrt", "--instances", "4", "--reference", str(int8)),
        ],
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = capsys.readouterr().out
    folder = tmp_path / "models" / "ssd-resnet34"
    assert (folder / "1" / "model.plan").read_bytes() == PLAN
    config = read_config(folder / "config.pbtxt")
    assert config.max_batch_size == 16
    assert list(config.input[0].dims) == [3, 400, 400]
    for path in folder.rglob("*.pbtxt"):  # together they make Triton answer wrongly
        cuda = read_config(path).optimization.cuda
        assert not cuda.graphs
        assert not cuda.output_copy_stream
    assert config.optimization.output_pinned_memory.enable
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert config.instance_group[0].count == 4
    (flag,) = [w for w in said.split() if w.startswith("--backend-config=tensorrt,plugins=")]
    plugin = Path(flag.rpartition("=")[2])
    assert plugin.read_bytes() == b"a library that registers the other"
    assert (plugin.parent / "libnmsoptplugin.so").read_bytes() == b"a library"
    readme = (tmp_path / "models" / "README").read_text()
    assert flag in readme
    assert len(readme.splitlines()) == 5


@pytest.mark.parametrize(("devices", "gpus"), [("1,3", [1, 3]), ("all", [])])
def test_gpus_to_serve_on(devices, gpus, request, tmp_path, monkeypatch):
    """Without a list, Triton takes every GPU that it finds."""
    engine, int8 = map(request.getfixturevalue, ("engine", "int8"))
    words = ["harness", "triton-repository", str(engine), "-o", str(tmp_path / "models")]
    words += ["--backend", "tensorrt", "--reference", str(int8), "--devices", devices]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    for path in (tmp_path / "models").rglob("*.pbtxt"):
        (group,) = read_config(path).instance_group
        assert (group.kind, group.count) == (pb.ModelInstanceGroup.KIND_GPU, 1)
        assert list(group.gpus) == gpus


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_gpus_for_instances_on_the_cpu_are_refused(backend, int8, tmp_path):
    with pytest.raises(EngineError, match="--devices chooses GPUs, and this repository's"):
        write_repository(int8, tmp_path / "models", backend, gpus=(0,))
    assert not (tmp_path / "models").exists()


def test_cuda_graphs_when_asked_for(engine, int8, tmp_path):
    write_repository(engine, tmp_path / "models", "tensorrt", graphs=True, reference=int8)
    for path in (tmp_path / "models").rglob("*.pbtxt"):
        cuda = read_config(path).optimization.cuda
        assert cuda.graphs
        assert not cuda.output_copy_stream
    with pytest.raises(EngineError, match="--graphs: only Triton's backend tensorrt"):
        write_repository(int8, tmp_path / "others", "onnxruntime", graphs=True)


def test_known_answers_need_an_engine_that_runs(engine, int8, exported, tmp_path):
    """This machine has no GPU, or its TensorRT does not take that plan."""
    with pytest.raises(EngineError, match="known answers need it, or --reference"):
        write_repository(engine, tmp_path / "models", "tensorrt")
    with pytest.raises(EngineError, match=f"does not come from {exported}"):
        write_repository(engine, tmp_path / "models", "tensorrt", reference=exported)
    assert not (tmp_path / "models").exists()


def test_the_python_backend_gets_an_engine_that_can_be_moved(engine, int8, tmp_path):
    write_repository(engine, tmp_path / "models", "python", reference=int8)
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "ssd-resnet34" / "1" / engine.name
    manifest = load_manifest(moved)
    (library,) = check_plugins(moved, manifest)
    assert library.parent == moved.parent
    assert replace(manifest, plugins=()) == replace(load_manifest(engine), plugins=())
    config = read_config(moved.parent.parent / "config.pbtxt")
    assert config.parameters["engine"].string_value == "tensorrt"
    assert config.parameters["model_file"].string_value == engine.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "onnxruntime"}, "is for tensorrt"),
        ({"backend": "openvino"}, "tensorrt, onnxruntime, python"),
        ({"backend": "tensorrt", "max_batch": 17}, "up to 16, not 17"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments, message, engine, tmp_path):
    with pytest.raises((EngineError, HarnessError), match=message):
        write_repository(engine, tmp_path / "models", **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"engines", "plugins"}


def test_an_engine_without_batches_of_one_is_refused(engine, tmp_path):
    save_engine(engine, PLAN, replace(load_manifest(engine), min_batch=4))
    with pytest.raises(EngineError, match="smallest batch is 4"):
        write_repository(engine, tmp_path / "models", "tensorrt")


def test_an_onnx_file_is_no_plan(int8, tmp_path):
    with pytest.raises(EngineError, match="is for onnxruntime, which Triton's backend tensorrt"):
        write_repository(int8, tmp_path / "models", "tensorrt")


def test_a_folder_is_never_overwritten(int8, tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(HarnessError, match="exists"):
        write_repository(int8, tmp_path / "models", "python")


def test_no_detector(tmp_path):
    head, shape = '<ir_version: 10, opset_import: ["": 18]>', "float[n,3,8,8]"
    model = onnx.parser.parse_model(f"{head} g ({shape} x) => ({shape} y) {{ y = Identity (x) }}")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="no outputs detections"):
        write_repository(tmp_path / "m.onnx", tmp_path / "models", "python")


def test_without_the_client_library(int8, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(EngineError, match=r"pip install 'tritonclient\[grpc\]'"):
        write_repository(int8, tmp_path / "models", "python")


def test_a_full_disk_leaves_nothing(int8, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "model.onnx")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(HarnessError, match="No space left"):
        write_repository(int8, tmp_path / "models", "onnxruntime")
    assert not (tmp_path / "models").exists()


def test_the_scale_survives_as_text(int8):
    """What the client compares is equal only if no digit is lost."""
    from engine.backends.triton.served import served_model

    served = served_model(int8)
    assert np.float64(served.identity()["input_scale"]) == served.input.scale

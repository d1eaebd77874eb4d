"""TensorRT itself and Triton's TensorRT backend, on a GPU, against ONNX Runtime.

Needs the package tensorrt with its libraries; for Triton, a ``tritonserver`` on the PATH that has
the backend tensorrt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from engine.backends.tensorrt.layers import describe_plan
from engine.backends.tensorrt.refit import refit
from engine.backends.triton import engine as triton
from engine.backends.triton.config import KNOWN_PARAMETER
from engine.backends.triton.known import KnownAnswers
from engine.backends.triton.memory import SystemMemory
from engine.comparison.files import compare_files
from engine.data.matching import match_detections
from engine.errors import EngineError
from engine.load import load_engine
from engine.manifest import load_manifest
from engine.model import load_detector
from graph_surgery.files import load, save
from graph_surgery.nms_function import plugin_only
from graph_surgery.replace import insert_nms
from harness.data.dataset import known_dataset
from harness.data.preprocess import preprocess
from harness.triton.repository import write_repository
from harness.triton.server import running_server
from tests.support import ROOT, attempt, command
from tests.support.plans import detections, matched

cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
pytest.importorskip("tensorrt", reason="needs TensorRT", exc_type=(ImportError, OSError))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        int(cuda.cudaGetDeviceCount()[0]) != 0 or not cuda.cudaGetDeviceCount()[1],
        reason="needs a GPU",
    ),
]

IMAGES = 32
CHECKPOINT = ROOT / "demo" / "ssd-resnet34-demo.safetensors"


def preprocessed(model, split, folder):
    """The demo's pictures as a model takes them."""
    spec = load_engine("onnxruntime", model).input_spec
    return preprocess(
        known_dataset("demo", split, folder),
        spec,
        folder / f"{split}-{spec.dtype}",
        workers=8,
        overwrite=False,
        skip_bad=False,
        progress=False,
        say=print,
    )


@pytest.fixture(scope="module")
def float_model(folder):
    command("export", "--weights", CHECKPOINT, "-o", folder / "demo.onnx")
    save(insert_nms(load(folder / "demo.onnx")).model, folder / "demo.nms.onnx")
    return folder / "demo.nms.onnx"


@pytest.fixture(scope="module")
def int8_model(float_model, folder):
    source = preprocessed(float_model, "cal", folder).directory
    command("engine", "calibrate", float_model, "-o", folder / "cal.json", "--data", source)
    command("engine", "quantize", float_model, folder / "cal.json", folder / "demo.int8.onnx")
    return folder / "demo.int8.onnx"


@pytest.fixture(scope="module")
def images(float_model, int8_model, folder):
    """Pictures of the validation set, as each model takes them."""
    return {
        model: preprocessed(model, "val", folder).load(range(IMAGES))
        for model in (float_model, int8_model)
    }


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_float_plan(float_model, make_plan, images, batch):
    plan = make_plan(float_model)
    there = detections(load_engine("onnxruntime", float_model), images[float_model])
    here = detections(load_engine("tensorrt", plan), images[float_model], batch)
    share, differences = matched(there, here, 0.99)
    assert share == 1
    assert np.abs(differences).max() < 1e-4  # a float32 network of 34 layers


def test_int8_plan(int8_model, make_plan, images):
    plan = make_plan(int8_model)
    there = detections(load_engine("onnxruntime", int8_model), images[int8_model])
    here = detections(load_engine("tensorrt", plan), images[int8_model])
    share, _ = matched(there, here, 0.9)
    assert share > 0.9


def test_the_manifest_names_the_headers_of_the_plugin(float_model, make_plan):
    (plugin,) = load_manifest(make_plan(float_model)).plugins
    assert plugin.headers.split(".")[0].isdecimal()


def test_the_definition_in_the_file_is_never_built(float_model, folder):
    """Nor is a plan of it written; in a process of its own, which has no plugin."""
    words = ("engine", "build", float_model, "--backend", "tensorrt", "-o", folder / "no.engine")
    done = attempt("-m", *words)
    assert done.returncode == 2
    assert "the plugin NMS_OPT_TRT (version 1) is not registered" in done.stderr
    assert not (folder / "no.engine").exists()


def test_polygraphy_builds_the_file_without_the_definition(
    float_model, trt_plugin_library, images, folder
):
    """As docs/plugin.md says; the outputs are those of ONNX Runtime on the whole file."""
    other = folder / "demo.plugin.onnx"
    save(plugin_only(load(float_model)), other)
    register = trt_plugin_library.with_name("libnmsoptplugin_register.so")
    np.save(folder / "images.npy", images[float_model][:4])
    loader = folder / "images.py"
    loader.write_text(
        "import numpy as np\ndef load_data():\n"
        f"    for image in np.load({str(folder / 'images.npy')!r}):\n"
        "        yield {'image': image[None]}\n"
    )
    done = attempt(
        *("-c", "from polygraphy.tools import main; main()"),
        *("run", other, "--trt", "--strongly-typed", "--plugins", "libnvinfer.so.10", register),
        *("--data-loader-script", loader, "--save-outputs", folder / "trt.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from polygraphy.comparator import RunResults

    results = RunResults.load(str(folder / "trt.json"))
    ((_, iterations),) = results.items()
    here = [one["detections"][0][: int(one["num_detections"][0])] for one in iterations]
    there = detections(load_engine("onnxruntime", float_model), images[float_model][:4])
    for one, other_one in zip(here, there, strict=True):
        found = match_detections(one, other_one, 0.99)
        assert len(found.pairs) == len(one) == len(other_one)


def test_what_this_release_lacks_is_said_in_one_line(float_model, make_plan):
    with pytest.raises(EngineError, match=r"--version-compatible needs .*lean runtime") as caught:
        make_plan(float_model, "lean", version_compatible=True)
    assert "\n" not in str(caught.value)


def test_sizes_in_turn_with_two_batches_in_flight(int8_model, make_plan, images):
    """Each size has a CUDA graph of its own in each slot, and all share memory."""
    engine = load_engine("tensorrt", make_plan(int8_model))
    pictures = images[int8_model]
    alone = detections(engine, pictures, 1)
    session = engine.session()
    sizes = [1, 5, 16, 5, 2, 16, 16, 1, 5, 5, 1, 1, 2, 2, 16]
    parts = [[index % IMAGES for index in range(n, n + size)] for n, size in enumerate(sizes)]
    found = []
    for number, part in enumerate(parts):
        session.submit([pictures[part]])
        if number:
            found.append([array.copy() for array in session.result()])
    found.append(session.result())
    session.close()
    for part, (rows, counts) in zip(parts, found, strict=True):
        here = [image[:count] for image, count in zip(rows, counts, strict=True)]
        pairs = [match_detections(alone[n], one, 0.9) for n, one in zip(part, here, strict=True)]
        both = sum(len(found.pairs) for found in pairs)
        assert 2 * both > 0.9 * sum(
            len(alone[n]) + len(one) for n, one in zip(part, here, strict=True)
        )


def test_heads_of_a_plan(float_model, int8_model, make_plan, folder):
    """Against ONNX Runtime on the same file; the engine's share and the quantiser's."""
    source = preprocessed(float_model, "val", folder).directory
    given = {"data": source, "random": None, "limit": 8, "annotations": None, "overrides": {}}
    found, _ = compare_files(float_model, make_plan(float_model), **given)
    assert found.passed and len(found.heads) == 12 and not found.alone
    same, _ = compare_files(int8_model, make_plan(int8_model), **given)
    assert same.passed and len(same.heads) == 12
    other, _ = compare_files(float_model, make_plan(int8_model), **given)
    assert other.passed
    assert [one.name for one in other.alone] == [one.name for one in same.heads]
    for alone, head in zip(other.alone, same.heads, strict=True):
        assert alone.snr_median == pytest.approx(head.snr_median, abs=0.5)
    assert sum(one.snr_median for one in other.heads) < sum(one.snr_median for one in other.alone)


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_tensors_between_layers(float_model, int8_model, make_plan, folder, precision):
    model = float_model if precision == "float" else int8_model
    source = preprocessed(float_model, "val", folder).directory
    given = {"data": source, "random": None, "limit": 4, "annotations": None, "overrides": {}}
    found, _ = compare_files(model, make_plan(model), layers=True, **given)
    assert found.passed, [one.what for one in found.checks if not one.passed]
    assert len(found.layers) > 30


def perturbed(model, folder):
    """Write the detector with other weights."""
    content = load(model)
    random = np.random.default_rng(0)
    for tensor in content.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.ndim == 4:
            value = value * random.uniform(0.9, 1.1, (len(value), 1, 1, 1)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    save(content, folder / "other.nms.onnx")
    return folder / "other.nms.onnx"


@pytest.mark.parametrize("option", ["refit", "strip_plan"])
def test_refit(float_model, make_plan, images, tmp_path, option):
    plan = make_plan(float_model, option, **{option: True})
    if option == "strip_plan":
        with pytest.raises(EngineError, match=r"its weights were stripped; .*'engine refit'"):
            load_engine("tensorrt", plan)
    other = perturbed(float_model, tmp_path)
    command("engine", "refit", plan, other, "-o", tmp_path / "new.engine")
    there = detections(load_engine("onnxruntime", other), images[float_model])
    here = detections(load_engine("tensorrt", tmp_path / "new.engine"), images[float_model])
    share, differences = matched(there, here, 0.99)
    assert share == 1
    assert np.abs(differences).max() < 1e-4
    assert load_manifest(tmp_path / "new.engine").onnx_sha256 == load_detector(other).sha256


def test_refit_of_int8_takes_weights_and_scales(
    float_model, make_plan, int8_model, folder, tmp_path
):
    plan = make_plan(int8_model, "refit", refit=True)
    other, source = perturbed(float_model, tmp_path), preprocessed(float_model, "cal", folder)
    cache, target = tmp_path / "cal.json", tmp_path / "other.int8.onnx"
    command("engine", "calibrate", other, "-o", cache, "--data", source.directory)
    command("engine", "quantize", other, cache, target)
    command("engine", "refit", plan, target, "-o", tmp_path / "new.engine")
    pictures = preprocessed(float_model, "val", folder).directory
    given = {"data": pictures, "random": None, "limit": 8, "annotations": None, "overrides": {}}
    found, _ = compare_files(target, tmp_path / "new.engine", **given)
    assert found.passed


def test_refit_of_what_does_not_fit(float_model, int8_model, make_plan, tmp_path):
    with pytest.raises(EngineError, match="built without --refit or --strip-plan"):
        refit(make_plan(float_model), load_detector(float_model), tmp_path / "new.engine")
    plan = make_plan(float_model, "refit", refit=True)
    with pytest.raises(EngineError, match="another network"):
        refit(plan, load_detector(int8_model), tmp_path / "new.engine")
    assert not (tmp_path / "new.engine").exists()


def test_layers_of_a_plan(int8_model, float_model, make_plan):
    plan = load_engine("tensorrt", make_plan(int8_model))
    found = describe_plan(plan, 8)
    assert sum(layer.kind.startswith("PluginV3") for layer in found.layers) == 1
    assert sum("Int8" in layer.writes for layer in found.layers) > 20
    assert all(layer.ms >= 0 for layer in found.layers) and found.session_bytes > 0
    both = command("engine", "inspect", make_plan(int8_model), make_plan(float_model))
    assert both.stdout.count("sum") == 1 and both.stdout.count("a session takes") == 2


# Triton's TensorRT backend


@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("graphs", [False, True])
def test_plan_through_triton(  # noqa: PLR0917
    int8_model, make_plan, images, tritonserver, tmp_path, instances, graphs
):
    """Detections are those without a server, whichever way the images go."""
    plan = make_plan(int8_model)
    direct = detections(load_engine("tensorrt", plan), images[int8_model])
    repository = write_repository(
        plan, tmp_path / "models", "tensorrt", instances=instances, graphs=graphs
    )
    with running_server(tritonserver, repository, tmp_path / "log") as server:
        engine = triton.load(plan, device=server.url)
        assert engine.manifest["images_through"] == "CUDA shared memory"
        system = replace(engine, _transport=SystemMemory.negotiate(engine._client))
        for way in (engine, system):
            for batch in (1, 8, 16):
                share, differences = matched(
                    direct, detections(way, images[int8_model], batch), 0.99
                )
                assert share > 0.99
                assert np.abs(differences).max() < 0.01


def test_graphs_with_a_copy_stream_are_found_out(
    int8_model, make_plan, tritonserver, tmp_path, monkeypatch
):
    """Triton's own fault: by the configuration, and where that is not looked at by the answers."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    plan = make_plan(int8_model)
    repository = write_repository(plan, tmp_path / "models", "tensorrt", graphs=True)
    for path in repository.path.rglob("*.pbtxt"):
        config = text_format.Parse(path.read_text(), ModelConfig())
        config.optimization.cuda.output_copy_stream = True
        path.write_text(text_format.MessageToString(config))
    with running_server(tritonserver, repository, tmp_path / "log") as server:
        with pytest.raises(EngineError, match="take output_copy_stream out of"):
            triton.load(plan, device=server.url)
        known = lambda config, *_: KnownAnswers.from_text(  # noqa: E731
            config.parameters[KNOWN_PARAMETER].string_value
        )
        monkeypatch.setattr(triton, "check_config", known)
        engine = triton.load(plan, device=server.url)
        with pytest.raises(EngineError, match="gives wrong answers"):
            for _ in range(3):
                engine.session().close()

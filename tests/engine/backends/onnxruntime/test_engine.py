"""The ONNX Runtime engine, on small graphs made here."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import onnx
import onnx.parser
import pytest

from engine.errors import EngineError
from engine.load import load_engine
from engine.protocol import InputSpec, TellsLayers

SIZE = 4
KEEP = 3


OUTPUTS = {"detections": f"float[{{batch}},{KEEP},7]", "num_detections": "{count}[{batch}]"}


def tiny_model(
    path,
    *,
    batch="batch",
    kind="float",
    metadata=None,
    function=False,
    shape=(3, SIZE, SIZE),
    outputs=OUTPUTS,
    count="int32",
):
    """Each image's mean m gives KEEP rows (0, m, m, m, m, m, m), of which one is valid."""
    mask = ", ".join("0111111" * KEEP)
    body = f"""
        real = Cast <to = 1> (image)
        axes = Constant <value = int64[3] {{1, 2, 3}}> ()
        mean = ReduceMean <keepdims = 0> (real, axes)
        last = Constant <value = int64[2] {{-1, -2}}> ()
        cube = Unsqueeze (mean, last)
        mask = Constant <value = float[1,{KEEP},7] {{{mask}}}> ()
        detections = Mul (cube, mask)
        count = Shape (mean)
        num_detections = ConstantOfShape <value = {count}[1] {{1}}> (count)"""
    definition = ""
    if function:
        definition = f"""
            <domain: "trt.plugins", opset_import: ["": 18]>
            NMS_OPT_TRT (image) => (detections, num_detections) {{{body}}}"""
        body = "detections, num_detections = trt.plugins.NMS_OPT_TRT (image)"
    ends = ", ".join(f"{OUTPUTS[name]} {name}".format(batch=batch, count=count) for name in outputs)
    image = ",".join(map(str, (batch, *shape)))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18, "trt.plugins": 1]>
        tiny ({kind}[{image}] image) => ({ends}) {{{body}}}{definition}""")
    onnx.helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("function", [False, True], ids=["plain", "NMS_OPT_TRT"])
@pytest.mark.parametrize("batch", [1, 5])
def test_infers_float32(batch, function, tmp_path):
    engine = load_engine("onnxruntime", tiny_model(tmp_path / "m.onnx", function=function))
    assert engine.input_spec == InputSpec("image", (3, SIZE, SIZE), "float32", None)
    assert engine.max_batch is None
    images = np.random.default_rng(0).random((batch, 3, SIZE, SIZE), np.float32)
    detections, counts = engine.session().infer(images)
    assert detections.dtype == np.float32 and detections.shape == (batch, KEEP, 7)
    assert counts.dtype == np.int32 and counts.tolist() == [1] * batch
    means = images.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(detections[:, 0, 1:], np.tile(means[:, None], 6), rtol=1e-5)


def test_infers_int8_with_its_scale(tmp_path):
    path = tiny_model(tmp_path / "m.onnx", kind="int8", metadata={"input_scale": "0.0207"})
    engine = load_engine("onnxruntime", path, threads=1)
    assert engine.input_spec == InputSpec("image", (3, SIZE, SIZE), "int8", 0.0207)
    images = np.full((2, 3, SIZE, SIZE), -5, np.int8)
    detections, _ = engine.session().infer(images)
    assert (detections[:, :, 5] == -5).all()


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_fixed_batch_takes_fewer_images(count, tmp_path):
    engine = load_engine("onnxruntime", tiny_model(tmp_path / "m.onnx", batch=4))
    assert engine.max_batch == 4
    images = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((3, SIZE, SIZE))
    detections, counts = engine.session().infer(images.astype(np.float32))
    assert counts.shape == (count,)
    assert detections[:, 0, 5].tolist() == list(range(count))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((5, 3, SIZE, SIZE), np.float32), "batch of 5 .* fixed at 4"),
        (np.zeros((1, 3, SIZE, SIZE), np.float64), "float64, the model takes float32"),
        (np.zeros((1, 3, SIZE, SIZE), np.int8), "int8, the model takes float32"),
        (np.zeros((1, 3, SIZE, 2), np.float32), r"shape \(1, 3, 4, 2\)"),
        (np.zeros((3, SIZE, SIZE), np.float32), r"shape \(3, 4, 4\)"),
        (np.zeros((0, 3, SIZE, SIZE), np.float32), r"shape \(0, 3, 4, 4\)"),
    ],
)
def test_wrong_images_are_refused(images, message, tmp_path):
    engine = load_engine("onnxruntime", tiny_model(tmp_path / "m.onnx", batch=4))
    with pytest.raises(EngineError, match=message):
        engine.session().infer(images)


def test_manifest_names_the_file_by_its_hash(tmp_path):
    path = tiny_model(tmp_path / "m.onnx")
    manifest = load_engine("onnxruntime", path, threads=1).manifest
    assert manifest["onnx_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["backend"] == "onnxruntime"
    assert manifest["provider"] == "CPUExecutionProvider"
    assert manifest["threads"] == 1
    assert manifest["input"] == {
        "name": "image",
        "shape": [3, SIZE, SIZE],
        "dtype": "float32",
        "scale": None,
    }
    assert manifest["keep_top_k"] == KEEP
    assert manifest["outputs"] == {"detections": [KEEP, 7], "num_detections": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "int8"}, "int8 input without the metadata 'input_scale'"),
        ({"kind": "int8", "metadata": {"input_scale": "often"}}, "'often'"),
        ({"kind": "int8", "metadata": {"input_scale": "-1"}}, "'-1'"),
        ({"kind": "int8", "metadata": {"input_scale": "nan"}}, "'nan'"),
        ({"kind": "uint8"}, "float32 or int8 expected"),
        ({"shape": (3, "h", SIZE)}, "fixed H and W"),
        ({"shape": (1, SIZE, SIZE)}, r"\[N, 3, H, W\]"),
        ({"outputs": ("detections",)}, "no output 'num_detections'"),
        ({"count": "int64"}, "tensor.int32. with 1 dimension"),
    ],
)
def test_other_models_are_refused(options, message, tmp_path):
    path = tiny_model(tmp_path / "m.onnx", **options)
    with pytest.raises(EngineError, match=message) as refusal:
        load_engine("onnxruntime", path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_broken_and_missing_files_are_refused(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(tiny_model(tmp_path / "m.onnx").read_bytes()[:100])
    with pytest.raises(EngineError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        load_engine("onnxruntime", broken)
    with pytest.raises(EngineError, match="no such model file"):
        load_engine("onnxruntime", tmp_path / "none.onnx")


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(EngineError, match="unknown engine 'tenserrt'"):
        load_engine("tenserrt", tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="unknown device 'tpu'"):
        load_engine("onnxruntime", tiny_model(tmp_path / "m.onnx"), device="tpu")


def test_a_missing_cuda_provider_is_one_sentence(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider; install"):
        load_engine("onnxruntime", tiny_model(tmp_path / "m.onnx"), device="cuda")


@pytest.mark.parametrize("batch", ["batch", 2])
def test_times_of_layers(tmp_path, batch):
    """Of every node that runs, where its time is that of the work: on a CPU."""
    path = tiny_model(tmp_path / "m.onnx", batch=batch)
    engine = load_engine("onnxruntime", path)
    assert isinstance(engine, TellsLayers)
    images, times = engine.layer_times(2)
    assert images == 2
    kinds = {name.rstrip("0123456789_") for name in times}
    assert (
        {"ReduceMean", "Unsqueeze", "Mul"}
        <= kinds
        <= {n.op_type for n in onnx.load(path).graph.node}
    )
    assert all(ms >= 0 for ms in times.values())
    elsewhere = dataclasses.replace(engine, manifest={**engine.manifest, "device": "cuda:0"})
    assert not elsewhere.tells_layers
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]

"""The shipped detector in ONNX Runtime's CUDA provider with libnms_opt.so, on a GPU.

Held against ONNX Runtime on the CPU running the same file, and, exactly, against the function body
of NMS_OPT_TRT on the head tensors that the GPU made.
"""

from __future__ import annotations

import threading

import numpy as np
import onnx
import pytest

from engine.backends.onnxruntime.cuda import CUDA_OPTIONS, SplitEngine, load_split
from engine.backends.onnxruntime.engine import OnnxRuntimeEngine
from engine.data.matching import match_detections
from engine.errors import EngineError
from engine.load import load_engine
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from plugin_cuda.errors import PluginError
from plugin_cuda.library import load_library
from tests.support.calibrated import write_images
from tests.support.demo_images import demo_images

ort = pytest.importorskip("onnxruntime")

BATCHES = (1, 3, 6)
KINDS = ("fp32", "int8", "int8+fp16")
FLOAT32_ALONE = CUDA_OPTIONS | {"use_tf32": "0"}


def missing() -> str | None:
    """What keeps these tests from running here."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return "needs cuda-bindings"
    error, count = runtime.cudaGetDeviceCount()
    if int(error) or not count:
        return "needs a GPU"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "needs onnxruntime-gpu"
    try:
        load_library()
    except PluginError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@pytest.fixture(scope="module")
def pictures():
    """Images of the demo set, as the network takes them."""
    return demo_images(max(BATCHES))


@pytest.fixture(scope="module")
def models(pictures, demo_surgered, tmp_path_factory):
    """The demo detector in every type."""
    folder = tmp_path_factory.mktemp("demo")
    calibration = calibrate(
        load_detector(demo_surgered), write_images(folder, pictures), method="minmax"
    )
    paths = {"fp32": demo_surgered}
    for kind, float_type in (("int8", "fp32"), ("int8+fp16", "fp16")):
        paths[kind] = folder / f"{kind}.onnx"
        model = quantize(onnx.load(demo_surgered), calibration, float_type=float_type)
        onnx.save(model, paths[kind])
    return paths


def batch_of(engine, pictures, count, start=0):
    chosen = np.take(pictures, range(start, start + count), axis=0, mode="wrap")
    scale = engine.input_spec.scale
    if scale is None:
        return chosen
    return np.clip(np.rint(chosen / np.float32(scale)), -127, 127).astype(np.int8)


def assert_alike(actual, expected, *, matched, score):
    """Every image by itself: the share of rows with a partner, and the scores of the pairs."""
    pairs, rows, differences = 0, 0, [0.0]
    for index, (first, used, second, other) in enumerate(zip(*actual, *expected, strict=True)):
        assert (first[:used, 0] == index).all()
        assert (first[used:, 6] == -1).all()
        found = match_detections(second[:other], first[:used])
        pairs += len(found.pairs)
        rows += used + other
        differences += np.abs(found.score_difference).tolist()
    assert rows >= 2 * len(actual[0])  # the demo images have objects
    assert 2 * pairs >= matched * rows
    assert max(differences) <= score


def rows_of_body(path, session, batch):
    """What the function body makes of the head tensors in the session's buffers."""
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.op_type == "NMS_OPT_TRT"]
    buffers, feeds = session._buffers, {}
    for name, (shape, dtype) in session._split.heads.items():
        feeds[name] = np.empty((batch, *shape), dtype)
        session._stream.download(feeds[name], buffers.heads_at[name])
    session._stream.synchronize()
    extractor = onnx.utils.Extractor(model)
    tail = extractor.extract_model(list(feeds), list(node.output))
    reference = ort.InferenceSession(tail.SerializeToString(), providers=["CPUExecutionProvider"])
    return reference.run(list(node.output), feeds)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_body_on_the_same_heads(kind, models, pictures):
    engine = load_engine("onnxruntime", models[kind], device="cuda")
    assert isinstance(engine, SplitEngine)
    assert engine.manifest["nms"] == "libnms_opt.so"
    session = engine.session()
    for count in (*BATCHES, 1):
        detections, counts = session.infer(batch_of(engine, pictures, count))
        expected, expected_counts = rows_of_body(models[kind], session, count)
        np.testing.assert_array_equal(counts, expected_counts)
        # ranks of scores that differ by less than rounding may be exchanged
        np.testing.assert_allclose(detections[..., 5], expected[..., 5], atol=1e-5)
        assert_alike((detections, counts), (expected, expected_counts), matched=1, score=1e-5)
    session.close()


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("fp32", FLOAT32_ALONE, {"matched": 0.99, "score": 0.002}),
        ("fp32", CUDA_OPTIONS, {"matched": 0.95, "score": 0.05}),
        ("fp32", CUDA_OPTIONS | {"prefer_nhwc": "1"}, {"matched": 0.95, "score": 0.05}),
        # the tolerance of `engine compare` for INT8
        ("int8", CUDA_OPTIONS, {"matched": 0.8, "score": 0.3}),
        ("int8+fp16", CUDA_OPTIONS, {"matched": 0.8, "score": 0.3}),
    ],
)
def test_detections_are_those_of_the_cpu(kind, options, tolerance, models, pictures):
    reference = load_engine("onnxruntime", models[kind]).session()
    engine = load_split(models[kind], options=options)
    session = engine.session()
    for count in BATCHES:
        images = batch_of(engine, pictures, count)
        assert_alike(session.infer(images), reference.infer(images), **tolerance)
    session.close()


def test_a_second_run_gives_the_same_bits(models, pictures):
    session = load_split(models["fp32"]).session()
    first, second = session.infer(pictures[:3]), session.infer(pictures[:3])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    session.close()


def test_sessions_in_two_threads(models, pictures):
    engine = load_split(models["fp32"])
    expected, found, errors = {}, {}, []
    alone = engine.session()
    for worker, sizes in enumerate(((1, 3, 1, 6), (6, 2, 3, 1))):
        expected[worker] = [alone.infer(batch_of(engine, pictures, n, worker)) for n in sizes]
    alone.close()

    def work(worker, sizes):
        try:
            session = engine.session()
            for _ in range(5):
                found[worker] = [
                    session.infer(batch_of(engine, pictures, n, worker)) for n in sizes
                ]
            session.close()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(worker, [len(n) for _, n in results]))
        for worker, results in expected.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not errors
    for worker, results in expected.items():
        for actual, reference in zip(found[worker], results, strict=True):
            assert_alike(actual, reference, matched=0.99, score=0.002)


def test_a_failure_leaves_the_session_usable_and_closes_cleanly(models, pictures, monkeypatch):
    from cuda.bindings import runtime

    engine = load_split(models["fp32"])

    def cycle():
        session = engine.session()
        expected, _ = session.infer(pictures[:3])

        def fail(*_):
            raise PluginError("refused")

        work = session._passes[3]
        session._passes[3] = type(work)(work.network, fail)
        with pytest.raises(EngineError, match="refused"):
            session.infer(pictures[:3])
        session._passes[3] = work
        with monkeypatch.context() as patch:
            patch.setattr(session, "_options", "no options")
            with pytest.raises(EngineError, match="ONNX Runtime failed"):
                session.infer(pictures[:3])
        np.testing.assert_array_equal(session.infer(pictures[:3])[0], expected)
        session.submit([pictures[:1]])
        session.close()  # with a batch under way
        session.close()
        _, free, _ = runtime.cudaMemGetInfo()
        return free

    after_first = cycle()
    for _ in range(3):
        after_last = cycle()
    assert after_last > after_first - (32 << 20)


@pytest.mark.parametrize("kind", ["fp32", "int8+fp16"])
def test_a_retinanet_s_rows_are_those_of_the_body(kind, tmp_path, caplog):
    """NMS_OPT_TRT of version 2: by libnms_opt.so, and nothing to say."""
    torch = pytest.importorskip("torch")
    from tests.support.retinanet import SMALL, surgered

    onnx.save(surgered(), tmp_path / "retina.onnx")
    torch.manual_seed(2)
    images = torch.randn(max(BATCHES), 3, *SMALL.image_shape).numpy()
    path = tmp_path / "retina.onnx"
    if kind != "fp32":
        calibration = calibrate(
            load_detector(path), write_images(tmp_path, images), method="minmax"
        )
        model = quantize(onnx.load(path), calibration, float_type="fp16")
        path = tmp_path / "retina.int8.onnx"
        onnx.save(model, path)
    engine = load_engine("onnxruntime", path, device="cuda")
    assert isinstance(engine, SplitEngine)
    assert engine.manifest["nms"] == "libnms_opt.so"
    assert not caplog.text
    session = engine.session()
    for count in (*BATCHES, 1):
        actual = session.infer(batch_of(engine, images, count))
        # suppression and the last row may hang on rounding
        assert_alike(actual, rows_of_body(path, session, count), matched=0.99, score=1e-5)
    session.close()


def test_without_the_library_the_graph_runs_whole(models, pictures, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("NMS_OPT_LIBRARY", str(tmp_path / "none.so"))
    engine = load_engine("onnxruntime", models["fp32"], device="cuda")
    assert isinstance(engine, OnnxRuntimeEngine)
    assert engine.manifest["nms"] == "ONNX Runtime"
    assert "build-plugin" in caplog.text
    actual = engine.session().infer(pictures[:3])
    expected = load_engine("onnxruntime", models["fp32"]).session().infer(pictures[:3])
    assert_alike(actual, expected, matched=0.95, score=0.05)

"""The cuDNN engine: what it refuses without a GPU; on one, the demo detector against exact
arithmetic and against ONNX Runtime on the same file.

ONNX Runtime without its graph optimisations is the reference for detections: they make the biases
INT32 and drop the quantisation in front of the pooling, and a step of difference grows on its way.
So ONNX Runtime's own heads differ by 25 to 40 dB with and without them.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest

from engine.backends.cudnn import engine as cudnn
from engine.backends.cudnn import tuning as cudnn_tuning
from engine.backends.cudnn.engine import batch_sizes
from engine.backends.cudnn.reader import read_int8_graph
from engine.data.matching import match_detections
from engine.errors import EngineError
from engine.load import load_engine
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from plugin_cuda.errors import PluginError
from plugin_cuda.int8_layers import PackShape, PoolShape, load_layers_library, max_pool, pack
from tests.support import attempt
from tests.support.calibrated import run, snr_db, write_images
from tests.support.cudnn_gpu import cudnn_missing
from tests.support.demo_images import demo_images
from tests.support.host_stream import HostStream
from tests.support.int8_graphs import Builder
from tests.support.int8_layers import packed, pooled, rounded, run_layers

MAX_BATCH = 8

gpu_reason = cudnn_missing()
on_gpu = pytest.mark.skipif(gpu_reason is not None, reason=gpu_reason or "")


def test_batch_sizes():
    assert batch_sizes(64) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    assert batch_sizes(1) == (1,)
    assert batch_sizes(5) == (1, 2, 3, 4, 5)
    assert batch_sizes(100)[-3:] == (64, 96, 100)


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (8, (1, 2, 3, 4, 6, 8)), (5, (1, 2, 3, 4, 5)), (None, batch_sizes(64))],
)
def test_kernels_are_looked_for_up_to_the_largest_batch_alone(
    largest, sizes, tmp_path, monkeypatch
):
    """As far as that search, which needs a GPU."""

    class SearchedError(Exception):
        pass

    def search(_cudnn, _handle, _graph, batches, *_, **__):
        raise SearchedError(batches)

    monkeypatch.setattr(cudnn, "_plans", search)
    monkeypatch.setattr(cudnn, "Stream", HostStream)
    monkeypatch.setattr(cudnn, "import_cudnn", lambda: MagicMock(__version__="1.0"))
    for name in (
        *("use_gpu", "load_detector", "split", "load_layers_library", "read_int8_graph"),
        "hopper_library",
    ):
        monkeypatch.setattr(cudnn, name, MagicMock())
    model = tmp_path / "model.onnx"
    model.touch()
    with pytest.raises(SearchedError) as found:
        load_engine("cudnn", model, max_batch=largest)
    assert found.value.args == (sizes,)
    assert HostStream.open_streams == 0


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "gpu"])
def test_another_device_is_refused(tmp_path, device):
    with pytest.raises(EngineError, match=f"cudnn runs on a GPU, not on '{device}'"):
        load_engine("cudnn", tmp_path / "model.onnx", device=device)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(EngineError, match=r"model.onnx: no such model file"):
        load_engine("cudnn", tmp_path / "model.onnx", device="cuda")


@pytest.mark.slow
def test_the_command_says_what_to_install(tmp_path):
    """In a process of its own, where nothing finds cuDNN's frontend."""
    model = tmp_path / "model.onnx"
    model.write_bytes(b"")
    hide = "import sys; sys.modules['cudnn'] = None; from harness.cli.main import main; main()"
    arguments = ["run", model, "--engine", "cudnn", "--device", "cuda"]
    done = attempt("-c", hide, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "what fails here is its frontend (nvidia-cudnn-frontend): import of" in done.stderr
    assert "pip install 'ssd-resnet34-trt[cudnn]'" in done.stderr


def test_a_frontend_without_cudnn_is_told(monkeypatch):
    def fail():
        raise RuntimeError("Unable to find symbol cudnnGetVersion")

    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=fail))
    with pytest.raises(EngineError, match=r"is cuDNN itself .*: Unable .*; pip install .*cudnn"):
        cudnn.import_cudnn()


def test_the_peer_computes_the_same_network():
    from engine.bench.cudnn_peer import network_of

    torch = pytest.importorskip("torch")
    builder = Builder(np.random.default_rng(0))
    x = builder.image(3, 20, 16)
    builder.head(x, 4)
    model = builder.model()
    graph = read_int8_graph(model)
    images = builder.rng.integers(-127, 128, (2, 3, 20, 16), np.int8)
    (expected,) = run(model, images, builder.heads)
    found = network_of(graph, "cpu")(torch.from_numpy(images).half())[builder.heads[0]]
    assert snr_db([expected], [found.numpy()]) > 50


@pytest.fixture(scope="module")
def pictures():
    """Images of the demo set, as the network takes them."""
    return demo_images(12)


@pytest.fixture(scope="module")
def model(pictures, demo_surgered, tmp_path_factory):
    """The demo detector in INT8."""
    folder = tmp_path_factory.mktemp("demo")
    calibration = calibrate(
        load_detector(demo_surgered), write_images(folder, pictures), method="minmax"
    )
    path = folder / "demo.int8.onnx"
    onnx.save(quantize(onnx.load(demo_surgered), calibration), path)
    return path


@pytest.fixture(scope="module")
def engine(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn_tuning, "HEAVY", 2.0)  # what cuDNN's heuristics advise will do
        return cudnn.load(model, max_batch=MAX_BATCH)


@pytest.fixture(scope="module")
def images(engine, pictures):
    steps = np.rint(pictures / np.float32(engine.input_spec.scale))
    return np.clip(steps, -127, 127).astype(np.int8)


@pytest.fixture
def session(engine):
    opened = engine.session()
    yield opened
    opened.close()


def same(first, second):
    """Detections but for the number of the image in its batch, and their counts."""
    np.testing.assert_array_equal(first[0][:, :, 1:], second[0][:, :, 1:])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.gpu
@on_gpu
def test_heads_against_exact_arithmetic(engine, session, images):
    batch = images[:8]
    session.infer(batch)
    expected, found = run_layers(engine.graph, batch), session.heads(len(batch))
    for name, head in engine.graph.heads.items():
        whole = expected[head.tensor][:, head.first : head.first + head.channels]
        pairs = zip(whole, found[name], strict=True)
        assert np.median([snr_db([one], [other]) for one, other in pairs]) >= 35, name


@pytest.mark.gpu
@on_gpu
def test_detections_against_onnx_runtime(session, model, images):
    found = [session.infer(images[first : first + 4]) for first in range(0, len(images), 4)]
    expected = run(onnx.load(model), images, ["detections", "num_detections"], optimise=False)
    rows, counts = (np.concatenate(part) for part in zip(*found, strict=True))
    pairs = total = 0
    for row, used, other, number in zip(rows, counts, *expected, strict=True):
        assert (row[used:, 6] == -1).all()
        pairs += len(match_detections(other[:number], row[:used]).pairs)
        total += int(used + number)
    assert total > 2 * len(images)  # the demo images have objects
    assert 2 * pairs >= 0.99 * total


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_batch_sizes_agree(session, images, count):
    one_by_one = [session.infer(images[index : index + 1]) for index in range(count)]
    found = session.infer(images[:count])
    same(found, [np.concatenate(part) for part in zip(*one_by_one, strict=True)])
    assert (found[0][:, 0, 0] == np.arange(count)).all()


@pytest.mark.gpu
@on_gpu
def test_runs_pinned_memory_and_order(engine, session, images):
    pinned = engine.host_array(images.shape, images.dtype)
    pinned[:] = images
    expected = [session.infer(images[first : first + 4]) for first in (0, 4, 8)]
    for turn in range(4):
        flying = []
        for index in range(6):
            start = 4 * ((index + turn) % 3)
            source = pinned if index % 2 else images
            runs = [source[start : start + 1], source[start + 1 : start + 4]]
            session.submit(runs)
            flying.append(start // 4)
            if len(flying) == session.depth:
                same(session.result(), expected[flying.pop(0)])
        while flying:
            same(session.result(), expected[flying.pop(0)])


@pytest.mark.gpu
@on_gpu
def test_sessions_beside_each_other_and_an_engine_loaded_again(engine, model, session, images):
    expected = session.infer(images[:8])
    with closing(engine.session()) as other:
        session.submit([images[:8]])
        other.submit([images[4:12]])
        same(session.result(), expected)
        same([part[:4] for part in other.result()], [part[4:] for part in expected])
    again = cudnn.load(model, max_batch=MAX_BATCH)  # from the tuning cache
    assert again.manifest == engine.manifest
    with closing(again.session()) as other:
        same(other.infer(images[:8]), expected)


@pytest.mark.gpu
@on_gpu
def test_the_manifest_says_what_runs(engine, model):
    manifest = engine.manifest
    assert manifest["backend"] == "cudnn"
    assert manifest["max_batch"] == engine.max_batch == MAX_BATCH
    assert manifest["input"]["dtype"] == engine.input_spec.dtype == "int8"
    rows = onnx.load(model).graph.output[0].type.tensor_type.shape.dim[1].dim_value
    assert manifest["keep_top_k"] == rows
    assert manifest["outputs"] == {"detections": [rows, 7], "num_detections": []}
    kernels = set(manifest["kernels"].values())
    assert all("cuDNN engine" in name or name.startswith("int8_conv") for name in kernels)
    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    assert float(metadata["input_scale"]) == engine.input_spec.scale


@pytest.mark.gpu
@on_gpu
def test_times_of_the_layers(engine):
    """Every layer of the graph is in one step, and NMS is the last."""
    images, times = engine.layer_times(5)
    assert images == 6  # the next of the sizes that are prepared
    assert ", ".join(times) == ", ".join(
        [*(one.name for one in engine.graph.layers), "NMS_OPT_TRT"]
    )
    assert all(ms > 0 for ms in times.values())


@pytest.mark.gpu
@on_gpu
def test_pack_and_pool_kernels():
    from engine.backends.cuda import Stream, use_gpu

    use_gpu(0)
    stream, library = Stream(), load_layers_library()
    rng = np.random.default_rng(0)

    def call(x, y, kernel):
        source, target = stream.device(x.nbytes), stream.device(y.nbytes)
        stream.upload(source, x)
        kernel(source, target)
        stream.download(y, target)
        stream.synchronize()
        return y

    for block, first in (((2, 2), (-4, -4)), ((1, 3), (-1, 0)), ((2, 1), (0, -2))):
        depth = -(-3 * block[0] * block[1] // 16) * 16
        shape = PackShape(2, 3, 21, 18, 13, 23, depth, *block, *first)
        x = rng.integers(-128, 128, (2, 3, 21, 18), np.int8)
        y = np.full((2, 13, 23, depth), np.nan, np.float16)
        found = call(x, y, lambda s, t, p=shape: pack(library, p, s, t, stream.handle))
        np.testing.assert_array_equal(found, packed(shape, x))
    for kernel, stride, pads in (((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 2))):
        x = rng.integers(-128, 128, (2, 15, 12, 32), np.int8)
        window = replace(_window(kernel, stride), pads=(*pads, *pads))
        rows, columns = (
            (size + 2 * pad - reach) // step + 1
            for size, pad, reach, step in zip((15, 12), pads, kernel, stride, strict=True)
        )
        pool = PoolShape(2, 32, 15, 12, rows, columns, *kernel, *stride, *pads)
        y = np.full((2, rows, columns, 32), 77, np.int8)
        found = call(
            x,
            y,
            lambda s, t, p=pool: max_pool(library, p, 1.7, x=s, y=t, stream=stream.handle),
        )
        largest = pooled(x.transpose(0, 3, 1, 2), window, rows, columns)
        expected = rounded(largest.astype(np.float32) * np.float32(1.7)).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(PluginError, match="not the multiple that is needed"):
        max_pool(library, replace(pool, channels=24), 1.0, x=256, y=256, stream=stream.handle)
    stream.close()


def _window(kernel, stride):
    from engine.backends.cudnn.graph import Window

    return Window(kernel, stride, (1, 1), (0, 0, 0, 0))

"""The cuDNN engine on a network as wide as the benchmark's, with random weights: every layer that
libint8_conv.so can take over run by it, and every layer run by cuDNN.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np
import onnx
import pytest

from engine.backends.cuda import Stream
from engine.backends.cudnn import engine as cudnn
from engine.backends.cudnn import tuning as cudnn_tuning
from engine.backends.cudnn.layers import padded
from engine.backends.cudnn.measure import Chooser
from engine.backends.cudnn.reader import read_int8_graph
from engine.backends.pipeline import Slot
from engine.backends.split import split
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from tests.support import command
from tests.support.calibrated import snr_db, write_images, write_surgered
from tests.support.cudnn_gpu import cudnn_missing
from tests.support.demo_images import demo_images
from tests.support.int8_layers import run_layers

REASON = cudnn_missing()

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        REASON is not None or torch.cuda.get_device_capability() != (9, 0),
        reason=REASON or "needs a GPU of compute capability 9.0",
    ),
]
BATCHES = (1, 3)


@pytest.fixture(scope="module", params=[400, 1200])
def size(request):
    """Side of the image; the benchmark's is 1200."""
    return request.param


@pytest.fixture(scope="module")
def images(size):
    return demo_images(4, size)


@pytest.fixture(scope="module")
def model(size, images, tmp_path_factory):
    """A detector of full width in INT8."""
    from safetensors.torch import save_file

    from export.ssd_resnet34.config import SSDConfig
    from tests.support.random_model import random_model

    folder = tmp_path_factory.mktemp("wide")
    network = random_model(SSDConfig(image_size=size))
    weights = folder / "wide.safetensors"
    save_file(network.state_dict(), weights, {"ssd_config": network.config.to_json()})
    command("export", "--weights", weights, "-o", folder / "wide.onnx")
    surgered = write_surgered(folder / "wide.onnx", folder / "wide.nms.onnx")
    calibration = calibrate(load_detector(surgered), write_images(folder, images), method="minmax")
    path = folder / "wide.int8.onnx"
    onnx.save(quantize(onnx.load(surgered), calibration), path)
    return path


@pytest.fixture(scope="module")
def expected(model, images):
    """Every activation by name in exact arithmetic."""
    parts = onnx.load(model)
    (scale,) = [float(p.value) for p in parts.metadata_props if p.key == "input_scale"]
    steps = np.clip(np.rint(images[: BATCHES[-1]] / np.float32(scale)), -127, 127).astype(np.int8)
    return run_layers(read_int8_graph(split(parts).network), steps)


@pytest.fixture(scope="module", params=[True, False], ids=["libint8_conv", "cudnn"])
def engine(model, request, tmp_path_factory):
    """The engine with libint8_conv.so wherever it can run, and without."""

    def choose(_self, candidates, _sizes, _settle_s):
        return candidates[-1 if request.param else 0].name

    path = tmp_path_factory.getbasetemp() / "cache.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn_tuning, "HEAVY", 2.0)  # what cuDNN's heuristics advise will do
        patch.setattr(cudnn, "cache_path", lambda _: path)
        patch.setattr(cudnn, "load_winners", lambda *_: {})
        patch.setattr(Chooser, "_measure", choose)
        engine = cudnn.load(model, max_batch=BATCHES[-1])
    kernels = list(engine.manifest["kernels"].values())
    assert ("int8_conv_stem" in kernels) == request.param
    assert kernels.count("int8_conv_3x3") == (25 if request.param else 0)
    return engine


@pytest.mark.parametrize("batch", BATCHES)
def test_every_layer_from_exact_inputs(engine, expected, batch):
    graph, program = engine.graph, engine.programs[batch]
    stream = Stream()
    memory = engine.reserve(stream)
    image = np.ascontiguousarray(expected[graph.image][:batch])
    slot = Slot(stream.device(image.nbytes), stream.device(1 << 20), stream.device(1 << 10))
    stream.upload(slot.images, image)
    for step, run in zip(program.steps, engine.bind(batch, memory, slot, stream), strict=False):
        first, last = step.layers[0], step.layers[-1]
        for name in {first.x, getattr(first, "residual", None)} - {graph.image, None}:
            nhwc = filled(expected[name][:batch])
            stream.upload(memory.arena + program.arena.offsets[name], nhwc)
        wanted = filled(expected[last.y][:batch])
        half = graph.tensors[last.y].scale is None
        found = np.full(wanted.shape, 77, np.float16 if half else np.int8)
        stream.upload(memory.arena + program.arena.offsets[last.y], found)
        run(stream.handle)
        stream.download(found, memory.arena + program.arena.offsets[last.y])
        stream.synchronize()
        if half:
            np.testing.assert_allclose(found, wanted, rtol=2**-10, atol=2**-10, err_msg=step.name)
        else:  # equal but for values on a tie
            apart = np.abs(found.astype(int) - wanted)
            assert apart.max() <= 1, step.name
            assert np.count_nonzero(apart) <= max(2, 1e-4 * apart.size), step.name
    stream.close()


def filled(values):
    """NHWC, zeros behind the last channel."""
    fill = padded(values.shape[1]) - values.shape[1]
    return np.pad(values.transpose(0, 2, 3, 1), [(0, 0)] * 3 + [(0, fill)])


def test_the_layers_in_turn(engine, expected):
    """Steps of rounding grow on their way through random weights; a wrong layer leaves 0 dB."""
    with closing(engine.session()) as session:
        for size in BATCHES:
            session.infer(expected[engine.graph.image][:size])
            for name, found in session.heads(size).items():
                head = engine.graph.heads[name]
                last = head.first + head.channels
                wanted = expected[head.tensor][:size, head.first : last]
                assert snr_db([wanted], [found]) >= 12, (name, size)

"""The session of an engine file, on a CUDA that does only what is ordered.

TensorRT is stood in for by a context that copies the images to the detections, between the buffers
that the session gave it and on its stream.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest

from engine.backends.tensorrt.engine import Engine
from engine.errors import EngineError
from engine.protocol import InputSpec
from tests.support.host_stream import array_at
from tests.support.lazy_cuda import LazyCuda

pytest.importorskip("polygraphy", reason="needs Polygraphy")

SPEC = InputSpec("image", (3, 7, 1), "float32")  # 21 floats an image, as 3 rows of 7
MAX_BATCH = 8


class CopyContext:
    """What `refuses` names returns False, as TensorRT does."""

    def __init__(self, cuda, refuses=""):
        self.cuda, self.refuses = cuda, refuses
        self.addresses, self.shapes, self.runs = {}, [], 0

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.refuses != "buffer"

    def set_input_shape(self, name, shape):
        assert name == "image"
        assert shape[1:] == SPEC.shape
        self.shapes.append(shape[0])
        return self.refuses != "shape"

    def execute_async_v3(self, handle):
        if self.refuses == "start":
            return False
        (stream,) = [stream for stream in self.cuda.streams if stream.handle == handle]
        batch = self.shapes[-1]
        images = array_at(self.addresses["image"], (batch, 21), np.float32)
        detections = array_at(self.addresses["detections"], (batch, 21), np.float32)
        counts = array_at(self.addresses["num_detections"], (batch,), np.int32)

        def work():
            detections[:] = images
            counts[:] = np.arange(batch)

        stream.enqueue(work)
        self.runs += 1
        return True


class CopyPlan:
    def __init__(self, context):
        self.context = context

    def get_tensor_shape(self, name):
        assert name == "detections"
        return (-1, 3, 7)

    def create_execution_context(self):
        if self.context is None:
            logging.getLogger("Polygraphy").error("[E] no room\nfor it")
        return self.context


@pytest.fixture
def cuda(monkeypatch):
    cuda = LazyCuda(0).stand_in(monkeypatch)
    yield cuda
    assert cuda.open == 0


def engine(context, min_batch=1):
    return Engine(SPEC, MAX_BATCH, {"min_batch": min_batch}, CopyPlan(context), 2)


def images(count, seed):
    return np.random.default_rng(seed).standard_normal((count, *SPEC.shape), np.float32)


def check(found, batch):
    detections, counts = found
    np.testing.assert_array_equal(detections, batch.reshape(-1, 3, 7))
    np.testing.assert_array_equal(counts, np.arange(len(batch)))
    assert (detections.dtype, counts.dtype) == (np.float32, np.int32)


def test_batches_of_changing_sizes(cuda):
    context = CopyContext(cuda)
    session = engine(context).session()
    assert session.depth == 1
    for seed, count in enumerate((8, 3, 3, 8, 1)):
        batch = images(count, seed)
        session.submit([batch[:1], batch[1:]] if count > 1 else [batch])
        check(session.result(), batch)
    assert context.shapes == [8, 3, 8, 1]  # told when it changes
    assert context.runs == 5
    assert set(cuda.used) == {2}
    session.close()


def test_a_batch_below_the_profile_is_filled_up(cuda):
    context = CopyContext(cuda)
    session = engine(context, min_batch=4).session()
    check(session.infer(images(2, 0)), images(2, 0))
    check(session.infer(images(5, 1)), images(5, 1))
    assert context.shapes == [4, 5]
    session.close()


def test_what_is_refused(cuda):
    session = engine(CopyContext(cuda)).session()
    with pytest.raises(EngineError, match="9 images, but the engine's profile ends at 8; build it"):
        session.submit([images(9, 0)])
    with pytest.raises(EngineError, match="no batch was submitted"):
        session.result()
    session.submit([images(2, 0)])
    with pytest.raises(EngineError, match="take a result first"):
        session.submit([images(1, 1)])
    check(session.result(), images(2, 0))
    session.close()


@pytest.mark.parametrize(
    ("refuses", "message"),
    [("shape", "TensorRT refuses a batch of 2"), ("start", "TensorRT could not start the batch")],
)
def test_a_batch_that_does_not_start(cuda, refuses, message):
    context = CopyContext(cuda, refuses)
    session = engine(context).session()
    for _ in range(2):
        with pytest.raises(EngineError, match=message):
            session.submit([images(2, 0)])
    context.refuses = ""
    check(session.infer(images(2, 1)), images(2, 1))  # the shape is told again
    session.close()


def test_a_buffer_that_is_refused_leaves_no_stream(cuda):
    with pytest.raises(EngineError, match="TensorRT refuses the buffer of image"):
        engine(CopyContext(cuda, "buffer")).session()


def test_no_context_is_one_line_with_what_tensorrt_said(cuda):
    with pytest.raises(EngineError, match=r"could not make a context: no room for it$"):
        engine(None).session()

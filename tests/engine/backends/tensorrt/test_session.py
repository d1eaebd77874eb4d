"""The session of an engine file, on a CUDA that does only what is ordered.

TensorRT is stood in for by a context that copies the images to the detections, between the buffers
that the session gave it and on its stream.
"""

from __future__ import annotations

import logging
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from engine.backends.tensorrt.engine import Engine
from engine.errors import EngineError, SessionLostError
from engine.protocol import InputSpec
from tests.support.host_stream import array_at
from tests.support.lazy_cuda import LazyCuda, LazyStream

pytest.importorskip("polygraphy", reason="needs Polygraphy")

SPEC = InputSpec("image", (3, 7, 1), "float32")  # 21 floats an image, as 3 rows of 7
MAX_BATCH = 8


class CopyContext:
    """What `refuses` of its plan names returns False, as TensorRT does."""

    def __init__(self, plan):
        self.plan = plan
        self.addresses, self.memory, self.batch, self.runs = {}, None, None, 0

    def set_device_memory(self, address, size):
        assert size == CopyPlan.device_memory_size_v2
        self.memory = address

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.plan.refuses != "buffer"

    def set_input_shape(self, name, shape):
        assert name == "image"
        assert shape[1:] == SPEC.shape
        assert self.batch is None  # CUDA graphs were recorded with it
        if self.plan.refuses == "shape":
            return False
        self.batch = shape[0]
        return True

    def execute_async_v3(self, handle):
        if self.plan.refuses == "start":
            return False
        assert self.memory is not None
        (stream,) = [stream for stream in self.plan.cuda.streams if stream.handle == handle]
        images = array_at(self.addresses["image"], (self.batch, 21), np.float32)
        detections = array_at(self.addresses["detections"], (self.batch, 21), np.float32)
        counts = array_at(self.addresses["num_detections"], (self.batch,), np.int32)

        def work():
            detections[:] = images
            counts[:] = np.arange(len(counts))

        stream.enqueue(work)
        self.runs += 1
        return True


class CopyPlan:
    device_memory_size_v2 = 100

    def __init__(self, cuda, refuses=""):
        self.cuda, self.refuses, self.contexts = cuda, refuses, []

    def get_tensor_shape(self, name):
        assert name == "detections"
        return (-1, 3, 7)

    def create_execution_context(self, strategy):
        assert strategy == "user's"
        if self.refuses == "context":
            logging.getLogger("Polygraphy").error("[E] no room\nfor it")
            return None
        self.contexts.append(CopyContext(self))
        return self.contexts[-1]


TRT = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user's"))


@pytest.fixture
def cuda(monkeypatch):
    cuda = LazyCuda(0).stand_in(monkeypatch)
    yield cuda
    assert cuda.open == 0


def engine(plan, min_batch=1, backend="tensorrt"):
    manifest = {"min_batch": min_batch, "backend": backend}
    return Engine(SPEC, MAX_BATCH, manifest, TRT, plan, 2)


def images(count, seed):
    return np.random.default_rng(seed).standard_normal((count, *SPEC.shape), np.float32)


def check(found, batch):
    detections, counts = found
    np.testing.assert_array_equal(detections, batch.reshape(-1, 3, 7))
    np.testing.assert_array_equal(counts, np.arange(len(batch)))
    assert (detections.dtype, counts.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_batches_of_changing_sizes(cuda, backend):
    plan = CopyPlan(cuda)
    session = engine(plan, backend=backend).session()
    waiting = deque()
    sizes = (8, 3, 3, 8, 1, 3, 8, 8, 3, 3)
    for seed, count in enumerate(sizes):
        batch = images(count, seed)
        session.submit([batch[:1], batch[1:]] if count > 1 else [batch])
        waiting.append(batch)
        cuda.progress()
        if len(waiting) == session.depth:
            check(session.result(), waiting.popleft())
    while waiting:
        check(session.result(), waiting.popleft())
    assert [context.batch for context in plan.contexts] == [8, 3, 1]
    runs = sum(context.runs for context in plan.contexts)
    if backend == "tensorrt-rtx":
        assert runs == len(sizes)
    else:  # what was recorded is replayed: once started and once recorded for a size in a slot
        assert runs == 2 * len({(count, number % 2) for number, count in enumerate(sizes)})
    assert set(cuda.used) == {2}
    session.close()


def test_a_batch_below_the_profile_is_filled_up(cuda):
    plan = CopyPlan(cuda)
    session = engine(plan, min_batch=4).session()
    check(session.infer(images(2, 0)), images(2, 0))
    check(session.infer(images(5, 1)), images(5, 1))
    assert [context.batch for context in plan.contexts] == [4, 5]
    session.close()


def test_what_is_refused(cuda):
    session = engine(CopyPlan(cuda)).session()
    with pytest.raises(EngineError, match="9 images, but the engine's profile ends at 8; build it"):
        session.submit([images(9, 0)])
    with pytest.raises(EngineError, match="no batch was submitted"):
        session.result()
    session.submit([images(2, 0)])
    session.submit([images(1, 1)])
    with pytest.raises(EngineError, match="take a result first"):
        session.submit([images(1, 2)])
    check(session.result(), images(2, 0))
    session.close()


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("context", r"could not make a context: no room for it$"),
        ("shape", "TensorRT refuses a batch of 2"),
        ("buffer", "TensorRT refuses the buffer of image"),
        ("start", "TensorRT could not start the batch"),
    ],
)
def test_a_batch_that_does_not_start(cuda, refuses, message):
    plan = CopyPlan(cuda, refuses)
    session = engine(plan).session()
    for _ in range(2):
        with pytest.raises(EngineError, match=message):
            session.submit([images(2, 0)])
    plan.refuses = ""
    check(session.infer(images(2, 1)), images(2, 1))
    session.close()


def test_a_batch_that_a_lost_gpu_does_not_start_loses_the_session(cuda, monkeypatch):
    """TensorRT says only that it could not; CUDA knows why."""
    session = engine(CopyPlan(cuda, "start")).session()

    def gone(_):
        raise SessionLostError("CUDA: uncorrectable ECC error encountered")

    with monkeypatch.context() as patch:
        patch.setattr(LazyStream, "synchronize", gone)
        with pytest.raises(SessionLostError, match="uncorrectable ECC"):
            session.submit([images(2, 0)])
    session.close()

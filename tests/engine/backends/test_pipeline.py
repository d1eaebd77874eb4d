"""The session that overlaps copies and work, on a CUDA that does only what is ordered."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.pipeline import PipelinedSession
from engine.errors import EngineError
from engine.protocol import InputSpec
from tests.support.host_stream import array_at
from tests.support.lazy_cuda import LazyCuda

SPEC = InputSpec("image", (3, 2, 2), "int8", 0.5)
ROWS, MAX_BATCH = 4, 5


class Session(PipelinedSession):
    """The sum of an image's pixels is its first score; their number is their largest pixel."""

    def __init__(self, cuda, *, depth=2, failing=False):
        self.cuda, self.scratch, self.failing = cuda, 0, failing
        super().__init__(3, SPEC, MAX_BATCH, ROWS, self.prepare, depth=depth)

    def prepare(self, stream, slots):
        if self.failing:
            raise EngineError("no memory")
        shared = stream.device(MAX_BATCH * 12)  # work is serial, so batches may share it

        def enqueue(count, number):
            slot = slots[number]
            images = array_at(slot.images, (count, 12), np.int8)
            middle = array_at(shared, (count, 12), np.int8)
            detections = array_at(slot.detections, (count, ROWS, 7), np.float32)
            numbers = array_at(slot.counts, (count,), np.int32)

            def first():
                middle[:] = images

            def second():
                detections[:] = 0
                detections[:, 0, 5] = middle.sum(axis=1, dtype=np.int32)
                numbers[:] = middle.max(axis=1)

            stream.enqueue(first)
            stream.enqueue(second)

        return enqueue


@pytest.fixture
def make(monkeypatch):
    def made(seed=0, **options):
        return Session(LazyCuda(seed).stand_in(monkeypatch), **options)

    return made


def check(found, images):
    detections, counts = found
    assert detections.shape == (len(images), ROWS, 7)
    expected = images.reshape(len(images), -1)
    np.testing.assert_array_equal(detections[:, 0, 5], expected.sum(axis=1, dtype=np.int32))
    np.testing.assert_array_equal(counts, expected.max(axis=1))


def random_images(rng, count):
    return rng.integers(-128, 128, (count, *SPEC.shape), np.int8)


@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(1, 3))
def test_batches_in_flight_do_not_disturb_each_other(seed, depth):
    with pytest.MonkeyPatch.context() as patch:
        cuda = LazyCuda(seed).stand_in(patch)
        session = Session(cuda, depth=depth)
        rng = np.random.default_rng(seed)
        flying, last = [], None
        for _ in range(30):
            if rng.integers(2):
                cuda.progress()
            if last is not None:  # a result holds until the next one is taken
                check(*last)
            if len(flying) < depth and (not flying or rng.integers(2)):
                runs = [random_images(rng, int(rng.integers(1, 3))) for _ in range(2)]
                session.submit(runs)
                flying.append(runs)
            else:
                runs = flying.pop(0)
                found = session.result()
                check(found, np.concatenate(runs))
                last = found, np.concatenate(runs)
        while flying:
            check(session.result(), np.concatenate(flying.pop(0)))
        session.close()
        assert cuda.open == 0


def test_one_thread_submits_and_another_takes_results(make):
    session = make()
    rng = np.random.default_rng(1)
    batches = [random_images(rng, 1 + index % MAX_BATCH) for index in range(40)]
    room, ready = threading.Semaphore(session.depth), threading.Semaphore(0)
    failures = []

    def submit():
        for batch in batches:
            room.acquire()
            session.submit([batch])
            ready.release()

    def take():
        try:
            for batch in batches:
                ready.acquire()
                check(session.result(), batch)
                room.release()
        except BaseException as error:
            failures.append(error)
            room.release(len(batches))

    threads = [threading.Thread(target=work) for work in (submit, take)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    assert session.cuda.used.count(3) >= 3  # the device is a matter of each thread
    session.close()


def test_infer_returns_copies(make):
    session = make()
    rng = np.random.default_rng(2)
    first, second = random_images(rng, 3), random_images(rng, 2)
    kept = session.infer(first)
    for _ in range(4):
        session.infer(second)
    check(kept, first)
    session.close()


def test_images_that_lie_in_other_ways(make):
    session = make()
    images = random_images(np.random.default_rng(3), 4)
    check(session.infer(np.asfortranarray(images)), images)
    session.submit([images[::2], images[1::2][:, ::-1]])
    check(session.result(), np.concatenate([images[::2], images[1::2][:, ::-1]]))
    session.close()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "a batch without images"),
        ([(3, "int8"), (3, "int8")], "a batch of 6 images, the engine takes 1 to 5"),
        ([(1, "int8"), (1, "float32")], "images are float32, the engine takes int8"),
    ],
)
def test_batches_that_are_refused(make, runs, message):
    session = make()
    arrays = [np.zeros((count, *SPEC.shape), dtype) for count, dtype in runs]
    with pytest.raises(EngineError, match=message):
        session.submit(arrays)
    with pytest.raises(EngineError, match="no batch was submitted"):
        session.result()
    session.close()


def test_no_more_than_depth_in_flight(make):
    session = make(depth=2)
    images = random_images(np.random.default_rng(4), 6)
    session.submit([images[:2]])
    session.submit([images[2:5]])
    with pytest.raises(EngineError, match="2 batches are in flight; take a result first"):
        session.submit([images[5:]])
    check(session.result(), images[:2])
    session.submit([images[5:]])
    check(session.result(), images[2:5])
    check(session.result(), images[5:])
    with pytest.raises(EngineError, match="no batch was submitted"):
        session.result()
    session.close()


def test_a_fault_of_the_gpu_comes_out_of_result(make):
    session = make()
    session.submit([random_images(np.random.default_rng(5), 1)])
    session.cuda.fault = EngineError("CUDA: an illegal memory access was encountered")
    with pytest.raises(EngineError, match="illegal memory access"):
        session.result()


def test_a_session_that_does_not_open_leaves_no_stream(monkeypatch):
    cuda = LazyCuda(0).stand_in(monkeypatch)
    with pytest.raises(EngineError, match="no memory"):
        Session(cuda, failing=True)
    assert cuda.open == 0

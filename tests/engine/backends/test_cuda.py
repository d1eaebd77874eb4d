"""Buffers, streams, CUDA graphs and the session of the TensorRT engines, on a GPU.

TensorRT itself is stood in for by a context that copies the images to the detections, on the
stream and between the buffers that the session gave it.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engine.backends.cuda import Stream, check, pci_bus_id, pinned, use_gpu
from engine.backends.tensorrt.engine import Engine
from engine.errors import EngineError
from engine.protocol import InputSpec

cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        int(cuda.cudaGetDeviceCount()[0]) != 0 or not cuda.cudaGetDeviceCount()[1],
        reason="needs a GPU",
    ),
]

SHAPE = (3, 7, 1)  # 21 floats an image, as 3 rows of 7


class CopyContext:
    """Detections are the images; of their number every byte is 1."""

    def __init__(self):
        self.addresses, self.batch, self.runs = {}, 0, 0

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        assert name == "image"
        assert tuple(shape[1:]) == SHAPE
        self.batch = shape[0]
        return True

    def execute_async_v3(self, stream):
        self.runs += 1
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        target, source = self.addresses["detections"], self.addresses["image"]
        check(cuda.cudaMemcpyAsync(target, source, self.batch * 84, kind, stream))
        check(cuda.cudaMemsetAsync(self.addresses["num_detections"], 1, self.batch * 4, stream))
        return True


class CopyPlan:
    def __init__(self, context):
        self.context = context

    def get_tensor_shape(self, name):
        assert name == "detections"
        return (-1, 3, 7)

    def create_execution_context(self):
        return self.context


def open_session(context=None, min_batch=1):
    pytest.importorskip("polygraphy", reason="needs Polygraphy")  # which hears TensorRT's errors
    spec = InputSpec("image", SHAPE, "float32")
    return Engine(spec, 8, {"min_batch": min_batch}, CopyPlan(context or CopyContext())).session()


def images(count, seed):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32)


def check_batch(session, count, seed):
    batch = images(count, seed)
    detections, counts = session.infer(batch)
    np.testing.assert_array_equal(detections, batch.reshape(count, 3, 7))
    np.testing.assert_array_equal(counts, np.full(count, 0x01010101))
    assert (detections.dtype, counts.dtype) == (np.float32, np.int32)


def test_gpu_is_described():
    gpu = use_gpu(0)
    assert "NVIDIA" in gpu.name
    assert gpu.compute_capability.replace(".", "").isdecimal()
    with pytest.raises(EngineError, match="no CUDA device 99 can be used: CUDA: invalid device"):
        use_gpu(99)


def test_copies_and_graph_replay():
    use_gpu(0)
    stream = Stream()
    source, target = pinned((5, 3), np.int8), pinned((5, 3), np.int8)
    address = stream.device(source.nbytes)

    def work():
        stream.upload(address, source)
        stream.download(target, address)

    source[:], target[:] = 7, 0
    work()
    stream.synchronize()
    assert (target == 7).all()
    replay = stream.capture(work)
    source[:] = np.arange(15).reshape(5, 3)
    stream.synchronize()
    assert (target == 7).all()  # recording runs nothing
    replay()
    stream.synchronize()
    np.testing.assert_array_equal(target, np.arange(15).reshape(5, 3))
    stream.close()


def test_pinned_memory_lives_as_long_as_its_arrays():
    """As long as one of them refers to it, the driver knows it as host memory."""
    use_gpu(0)

    def kind(address):
        return check(cuda.cudaPointerGetAttributes(address)).type

    array = pinned((3, 5), np.float32)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 5), np.float32, True)
    address = array.ctypes.data
    view = array[1:, 2]
    del array
    assert kind(address) == cuda.cudaMemoryType.cudaMemoryTypeHost
    view[:] = 1
    del view
    assert kind(address) == cuda.cudaMemoryType.cudaMemoryTypeUnregistered


def test_too_much_pinned_memory_is_one_line():
    use_gpu(0)
    with pytest.raises(EngineError, match=r"CUDA: .*memory"):
        pinned((1 << 50,), np.int8)


def test_pci_address():
    assert re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", pci_bus_id(0))


def test_runs_of_a_batch():
    """Pinned and ordinary memory, one after the other."""
    session = open_session()
    batch = images(6, 3)
    first = pinned((4, *SHAPE), np.float32)
    first[:] = batch[:4]
    for _ in range(3):
        session.submit([first[:1], first[1:], batch[4:]])
        np.testing.assert_array_equal(session.result()[0], batch.reshape(6, 3, 7))
    session.close()


def test_another_thread_takes_the_result():
    session = open_session()
    batch = images(2, 4)
    session.submit([batch])
    with ThreadPoolExecutor(1) as pool:
        detections, _ = pool.submit(session.result).result()
    np.testing.assert_array_equal(detections, batch.reshape(2, 3, 7))
    session.close()


def test_freed_buffers_leave_the_stream():
    use_gpu(0)
    stream = Stream()
    size = 1 << 28

    before = cuda.cudaMemGetInfo()[1]
    stream.device(size)
    assert cuda.cudaMemGetInfo()[1] <= before - size
    stream.free()
    assert cuda.cudaMemGetInfo()[1] > before - size
    source, target = pinned((4,), np.int8), pinned((4,), np.int8)
    source[:], target[:] = 5, 0
    address = stream.device(source.nbytes)
    stream.upload(address, source)
    stream.download(target, address)
    stream.synchronize()
    assert (target == 5).all()
    stream.close()
    stream.close()


def test_failed_capture_leaves_the_stream_usable():
    use_gpu(0)
    stream = Stream()

    def work():
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        stream.capture(work)
    host = pinned((4,), np.float32)
    stream.upload(stream.device(host.nbytes), host)
    stream.synchronize()
    stream.close()


def test_session_of_changing_batches():
    context = CopyContext()
    session = open_session(context)
    sizes = (8, 3, 8, 1, 3, 8)
    for seed, count in enumerate(sizes):
        check_batch(session, count, seed)
    assert context.runs == len(sizes)
    session.close()


def test_batch_below_the_profile_is_filled_up():
    context = CopyContext()
    session = open_session(context, min_batch=4)
    check_batch(session, 2, 0)
    assert context.batch == 4
    session.close()


def test_halves_of_infer():
    session = open_session()
    with pytest.raises(EngineError, match="no batch was submitted"):
        session.result()
    batch = images(2, 1)
    session.submit([batch])
    with pytest.raises(EngineError, match="take a result first"):
        session.submit([batch])
    np.testing.assert_array_equal(session.result()[0], batch.reshape(2, 3, 7))
    with pytest.raises(EngineError, match="a batch of 9 images"):
        session.submit([images(9, 0)])
    session.close()

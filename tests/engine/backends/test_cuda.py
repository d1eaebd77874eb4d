"""Buffers, streams and CUDA graphs, on a GPU."""

from __future__ import annotations

import re

import numpy as np
import pytest

from engine.backends.cuda import Stream, check, pci_bus_id, pinned, use_gpu
from engine.errors import EngineError

cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        int(cuda.cudaGetDeviceCount()[0]) != 0 or not cuda.cudaGetDeviceCount()[1],
        reason="needs a GPU",
    ),
]


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
    stream.free()  # the stream is no more: CUDA must not be asked for it


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

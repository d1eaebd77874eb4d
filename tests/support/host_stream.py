"""A stand-in for CUDA streams and memory: memory of the host."""

from __future__ import annotations

import ctypes

import numpy as np


class HostStream:
    """`engine.backends.cuda.Stream` without a GPU; what is allocated is filled with 0xFF."""

    open_streams = 0

    def __init__(self):
        self.handle = 1
        self.memory = []
        HostStream.open_streams += 1

    def device(self, size):
        buffer = (ctypes.c_ubyte * size)()
        ctypes.memset(buffer, 0xFF, size)
        self.memory.append(buffer)
        return ctypes.addressof(buffer)

    def upload(self, address, array):
        assert array.flags.c_contiguous
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array, address):
        assert array.flags.c_contiguous
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def use_gpu(self):
        """There is none."""

    def synchronize(self):
        pass

    def free(self):
        self.memory.clear()

    def close(self):
        self.free()
        HostStream.open_streams -= 1


def pinned(shape, dtype):
    return np.full(shape, -1, dtype)


def array_at(address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_ubyte * size).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape)

"""A stand-in for CUDA's streams and events that does as little as it may, or as much.

Waiting for an event does what that event depends on, in an order drawn at random, and nothing
else; `progress` does all that one stream has. So what a program forgot to order is done too late
or too early, and its results are wrong.
"""

from __future__ import annotations

import ctypes

import numpy as np

from engine.backends import pipeline


class Work:
    """Something to do once, after other things."""

    def __init__(self, action, after):
        self.action, self.after, self.done = action, list(after), False

    def do(self, rng):
        """Do it and what it needs first; a loop, for chains are long."""
        stack = [self]
        while stack:
            work = stack[-1]
            waiting = [one for one in work.after if not one.done]
            if work.done:
                stack.pop()
            elif waiting:
                stack.append(waiting[rng.integers(len(waiting))])
            else:
                work.action()
                work.done, work.after = True, []
                stack.pop()


def nothing():
    pass


class LazyEvent:
    def __init__(self, cuda):
        self.cuda, self.work = cuda, None

    def synchronize(self):
        if self.cuda.fault is not None:
            raise self.cuda.fault
        if self.work is not None:
            self.work.do(self.cuda.rng)


class LazyCuda:
    """Makes streams; `fault` is raised by the next wait."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.fault = None
        self.open, self.used, self.streams = 0, [], []

    def stand_in(self, patch):
        """Let sessions of `engine.backends.pipeline` run on it."""
        patch.setattr(pipeline, "Stream", self.stream)
        patch.setattr(pipeline, "pinned", self.pinned)
        patch.setattr(pipeline, "use_gpu", self.use_gpu)
        return self

    def stream(self):
        self.streams.append(LazyStream(self))
        return self.streams[-1]

    def progress(self):
        self.streams[self.rng.integers(len(self.streams))].synchronize()

    def use_gpu(self, device):
        self.used.append(device)

    def pinned(self, shape, dtype):
        return np.full(shape, -1, dtype)


class LazyStream:
    """`engine.backends.cuda.Stream`; memory is filled with 0xFF."""

    def __init__(self, cuda):
        self.cuda, self.handle = cuda, id(self)
        self.gpu = cuda.used[-1]
        self.last, self.waits, self.memory = None, [], []
        self.recorded = None
        cuda.open += 1

    def enqueue(self, action):
        if self.recorded is not None:
            self.recorded.append(action)
            return
        after = [work for work in (self.last, *self.waits) if work is not None]
        self.last, self.waits = Work(action, after), []

    def event(self):
        return LazyEvent(self.cuda)

    def record(self, event):
        self.enqueue(nothing)
        event.work = self.last

    def wait(self, event):
        self.waits.append(event.work)

    def device(self, size):
        buffer = (ctypes.c_ubyte * max(size, 1))()
        ctypes.memset(buffer, 0xFF, size)
        self.memory.append(buffer)
        return ctypes.addressof(buffer)

    def upload(self, address, array):
        assert array.flags.c_contiguous
        self.enqueue(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

    def download(self, array, address):
        assert array.flags.c_contiguous
        self.enqueue(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def capture(self, work):
        self.recorded = []
        try:
            work()
        finally:
            actions, self.recorded = self.recorded, None

        def replay():
            for action in actions:
                self.enqueue(action)

        return replay

    def use_gpu(self):
        self.cuda.use_gpu(self.gpu)

    def synchronize(self):
        for work in (self.last, *self.waits):  # a stream that waits is not done before that
            if work is not None:
                work.do(self.cuda.rng)

    def close(self):
        self.synchronize()
        self.memory.clear()
        self.cuda.open -= 1

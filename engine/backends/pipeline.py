"""A session that keeps a GPU busy: while one batch is computed, the next one is copied in.

Three streams, for copies in, work, and copies out, ordered by events alone; the host waits in
`result` and nowhere else. What the work is, a backend says.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda import Event, Stream, pinned, use_gpu
from engine.errors import EngineError
from engine.protocol import DETECTION_FIELDS, InputSpec, Session, check_batch

DEPTH = 2
"""Batches in flight: one is computed, one is copied or waits."""


@dataclass(frozen=True)
class Slot:
    """Device memory of one batch in flight: addresses of images, detections and their numbers."""

    images: int
    detections: int
    counts: int


Enqueue = Callable[[int, int], None]
"""Starts the work on so many images of a slot of this number, on the stream it was made for."""

Prepare = Callable[[Stream, Sequence[Slot]], Enqueue]
"""Makes an `Enqueue` for a stream; memory taken from the stream is released with it."""


@dataclass(frozen=True)
class _Moments:
    copied: Event
    computed: Event
    done: Event


class PipelinedSession(Session):
    """A stream of execution; see `engine.protocol.Session`.

    One thread may submit while another takes results. Images in page-locked memory are copied
    while the host goes on; from other memory, CUDA copies them before `submit` returns.

    Parameters
    ----------
    device
        Number of the GPU.
    spec
        What an image is.
    max_batch
        Largest batch.
    rows
        keepTopK, rows of detections per image.
    prepare
        Makes what is to be done with a batch.
    depth
        Batches that may be in flight.
    too_large
        See `engine.protocol.check_batch`.
    """

    def __init__(
        self,
        device: int,
        spec: InputSpec,
        max_batch: int,
        rows: int,
        prepare: Prepare,
        *,
        depth: int = DEPTH,
        too_large: str | None = None,
    ) -> None:
        use_gpu(device)  # the current device is a matter of each thread
        self._depth = depth
        self._check = partial(check_batch, spec=spec, max_batch=max_batch, too_large=too_large)
        image_bytes = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        self._lock = threading.Lock()
        self._flying: deque[tuple[int, int]] = deque()  # (ticket, images)
        self._tickets = 0
        self._streams: list[Stream] = []
        try:
            self._copy_in, self._work, self._copy_out = (self._stream() for _ in range(3))
            shape = (max_batch, rows, DETECTION_FIELDS)
            # one more than there are slots: the last result is read while the others are written
            self._results: list[tuple[NDArray[np.float32], NDArray[np.int32]]] = [
                (pinned(shape, np.float32), pinned((max_batch,), np.int32))
                for _ in range(depth + 1)
            ]
            detections, counts = self._results[0]
            self._slots = tuple(
                Slot(
                    self._work.device(max_batch * image_bytes),
                    self._work.device(detections.nbytes),
                    self._work.device(counts.nbytes),
                )
                for _ in range(depth)
            )
            self._moments = tuple(
                _Moments(*(self._work.event() for _ in range(3))) for _ in range(depth)
            )
            self._enqueue = prepare(self._work, self._slots)
        except BaseException:
            self.close()
            raise

    @property
    def depth(self) -> int:
        """See `engine.protocol.Session.depth`."""
        return self._depth

    def submit(self, images: Sequence[NDArray[np.generic]]) -> None:
        """Start on a batch; see `engine.protocol.Session.submit`.

        Raises
        ------
        EngineError
            When the images are not what the engine takes, `depth` batches are in flight, or CUDA
            fails.
        """
        count = self._check(images)
        with self._lock:
            if len(self._flying) == self.depth:
                raise EngineError(f"{self.depth} batches are in flight; take a result first")
        self._work.use_gpu()
        number = self._tickets % self.depth
        slot, moments = self._slots[number], self._moments[number]
        address = slot.images
        for run in images:
            self._copy_in.upload(address, np.ascontiguousarray(run))
            address += run.nbytes
        self._copy_in.record(moments.copied)
        self._work.wait(moments.copied)
        self._enqueue(count, number)
        self._work.record(moments.computed)
        self._copy_out.wait(moments.computed)
        detections, counts = self._results[self._tickets % (self.depth + 1)]
        self._copy_out.download(detections[:count], slot.detections)
        self._copy_out.download(counts[:count], slot.counts)
        self._copy_out.record(moments.done)
        with self._lock:
            self._flying.append((self._tickets, count))
        self._tickets += 1

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Wait for the oldest batch in flight; see `engine.protocol.Session.result`.

        Raises
        ------
        EngineError
            When none is in flight, or CUDA failed.
        """
        with self._lock:
            if not self._flying:
                raise EngineError("no batch was submitted")
            ticket, count = self._flying[0]
        self._work.use_gpu()
        self._moments[ticket % self.depth].done.synchronize()
        with self._lock:
            self._flying.popleft()
        detections, counts = self._results[ticket % (self.depth + 1)]
        return detections[:count], counts[:count]

    def close(self) -> None:
        """Wait for what is in flight, and release streams and memory."""
        while self._streams:  # copies out first: they wait for all the others
            self._streams.pop().close()

    def _stream(self) -> Stream:
        self._streams.append(Stream())
        return self._streams[-1]

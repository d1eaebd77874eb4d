"""A session under test: the threads that give it batches and take their results."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import SessionLostError
from engine.protocol import Engine, Session
from harness.loadgen.batcher import Batch
from harness.loadgen.numa import gpu_cpus, running_on
from harness.loadgen.response import check_outputs, pack

if TYPE_CHECKING:
    from harness.loadgen.sut import Sut

_WARM_UP_SECONDS = 2.0
_WARM_UP_RUNS = 5
_CHECK_SECONDS = 0.05  # between two batches of a session that are checked, of 0.1 ms each
_SMALL_SECONDS = 10.0  # for all smaller batches, which an engine on a CPU has no need of


class Lane:
    """A session: a thread that submits batches, and one that takes and completes their results.

    Or LoadGen's thread does both, see `run`; then these two wait for batches of a session that is
    lost.
    """

    session: Session

    def __init__(self, sut: Sut, engine: Engine, number: int, opening: threading.Lock) -> None:
        device = str(engine.manifest.get("device", engine.manifest.get("backend")))
        gpu = engine.manifest.get("running_on")
        self.device = f"{device} ({gpu['uuid']})" if isinstance(gpu, Mapping) else device
        self.name = f"session {number} on {self.device}"
        self.warm_up_seconds = 0.0
        self._sut = sut
        self._engine = engine
        self._opening = opening
        self._running = threading.Lock()
        self._cpus = gpu_cpus(device)
        self._slots: SimpleQueue[None] = SimpleQueue()
        self._in_flight: SimpleQueue[tuple[Batch, float] | None] = SimpleQueue()
        self._drained = threading.Event()
        self._lock = threading.Lock()
        self.lost = False
        self._started: deque[float] = deque()
        self._last_result = self._last_check = 0.0
        self._threads: list[threading.Thread] = []

    def start(self, warm_up: Sequence[int], sizes: Sequence[int]) -> None:
        """See `Sut.start`; full batches run when all sessions have come so far."""
        self._thread(self._work, warm_up, sizes)

    def busy_for(self, now: float) -> float:
        """Seconds that the oldest call into the engine has taken until now; 0 without one."""
        try:
            oldest = self._started[0]
        except IndexError:
            return 0.0
        return 0.0 if self.lost else now - max(oldest, self._last_result)

    def run(self, batch: Batch) -> None:
        """Run and complete a batch in the caller's thread, while none is in flight."""
        with self._running:
            self._started.append(started := time.monotonic())
            try:
                self.session.submit(self._sut.library.runs(batch.indices))
                found = self.session.result()
            except SessionLostError as error:
                self._lose(batch, error)
            else:
                self._complete(batch, started, *found)

    def join(self, deadline: float) -> None:
        """Wait for the threads, until a time of `time.monotonic` at the latest."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _thread(self, target: Any, *args: Any) -> None:
        # a daemon: one that blocks in the engine must not keep the process
        thread = threading.Thread(target=target, args=args, name=self.name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, warm_up: Sequence[int], sizes: Sequence[int]) -> None:
        try:
            with running_on(self._cpus):
                with self._opening:  # one after the other: engines need not expect anything else
                    self._started.append(time.monotonic())
                    session = self._engine.session()
                    self._started.popleft()
                with contextlib.closing(session):
                    self.session = session
                    self._warm_up(session, warm_up, sizes)
                    self._thread(self._take_results, session)
                    self._sut.warmed_up()
                    try:
                        self._submit_batches(session)
                    except BaseException as error:  # told before waiting for the other thread
                        self._sut.fail(error)
                    self._in_flight.put(None)
                    self._drained.wait()
                    self._running.acquire()  # for good: not closed under LoadGen's thread
        except SessionLostError as error:  # in the warm-up: once the test runs, a batch is at hand
            self._lose(None, error)
        except BaseException as error:
            self._sut.fail(error)
        # LoadGen's logger may still read what this thread logged, and crashes when it is gone
        self._sut.ended.wait()

    def _warm_up(self, session: Session, indices: Sequence[int], sizes: Sequence[int]) -> None:
        """Run smaller batches, then measure full ones, of which the first may be slower."""
        begin = time.monotonic()
        for size in sizes:
            if time.monotonic() - begin > _SMALL_SECONDS:
                break
            self._run(session, indices[:size], 1)
        if not self._sut.come_together():
            return
        begin = time.monotonic()
        seconds: list[float] = []
        while not seconds or (
            len(seconds) < _WARM_UP_RUNS and time.monotonic() - begin < _WARM_UP_SECONDS
        ):
            seconds.append(self._run(session, indices, 1))
        if session.depth > 1:
            seconds.append(self._run(session, indices, 3 * session.depth))
        self.warm_up_seconds = max(min(seconds), 1e-6)

    def _run(self, session: Session, indices: Sequence[int], batches: int) -> float:
        """Seconds per batch, with as many in flight as the session takes."""
        images = self._sut.library.runs(indices)
        begin = time.monotonic()
        for number in range(batches + session.depth):
            if number >= session.depth and number - session.depth < batches:
                detections, counts = session.result()
                self._took_result()
                check_outputs(detections, counts, len(indices))
            if number < batches:
                self._started.append(time.monotonic())
                session.submit(images)
        return (time.monotonic() - begin) / batches

    def _submit_batches(self, session: Session) -> None:
        sut = self._sut
        for _ in range(session.depth):
            self._slots.put(None)
        while True:
            self._slots.get()
            batch = None if self.lost else sut.batcher.take()
            if batch is None:
                return
            if self.lost:  # while it waited
                sut.batcher.put_back(batch)
                return
            images = sut.library.runs(batch.indices)
            started = time.monotonic()
            self._started.append(started)
            try:
                session.submit(images)
            except SessionLostError as error:
                self._lose(batch, error)
                return
            self._in_flight.put((batch, started))

    def _take_results(self, session: Session) -> None:
        try:
            with running_on(self._cpus):
                while (item := self._in_flight.get()) is not None and self._sut.failure is None:
                    self._finish(session, *item)
        except BaseException as error:
            self._sut.fail(error)
        self._slots.put(None)
        self._drained.set()
        self._sut.ended.wait()  # see `_work`

    def _finish(self, session: Session, batch: Batch, started: float) -> None:
        """Take the result of the oldest batch in flight, and complete its samples."""
        sut = self._sut
        if self.lost:
            sut.batcher.put_back(batch)
            return
        try:
            detections, counts = session.result()
        except SessionLostError as error:
            self._lose(batch, error)
            self._slots.put(None)
            return
        self._slots.put(None)  # the arrays are valid until the next result is taken
        self._complete(batch, started, detections, counts)

    def _complete(
        self,
        batch: Batch,
        started: float,
        detections: NDArray[np.float32],
        counts: NDArray[np.int32],
    ) -> None:
        sut, seconds = self._sut, self._took_result() - started
        check_outputs(detections, counts, len(batch.ids))
        checked = sut.check_all or self._last_result - self._last_check >= _CHECK_SECONDS
        if checked:
            self._last_check = self._last_result
        packed = pack(detections, counts, batch.indices, checked=checked, labels=sut.labels)
        sut.complete(batch, seconds, *packed)

    def _took_result(self) -> float:
        self._started.popleft()
        self._last_result = time.monotonic()
        return self._last_result

    def _lose(self, batch: Batch | None, error: SessionLostError) -> None:
        """Give a batch to the other sessions; either thread may be the first to find out."""
        with self._lock:
            first, self.lost = not self.lost, True
        if batch is not None:
            self._sut.batcher.put_back(batch)
        if first:
            self._sut.lose(self, error)

"""The system under test: LoadGen's queries in, batches through the engines, responses out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from queue import SimpleQueue
from typing import Any

import mlperf_loadgen as lg
from numpy.typing import NDArray

from engine.errors import SessionLostError
from engine.protocol import Engine, Session
from harness.loadgen.batcher import Batch, Batcher, Completion
from harness.loadgen.clock import Times
from harness.loadgen.numa import gpu_cpus, running_on
from harness.loadgen.qsl import SampleLibrary
from harness.loadgen.response import check_outputs, pack

_WARM_UP_SECONDS = 2.0
_WARM_UP_RUNS = 5
_CHECK_SECONDS = 0.05  # between two batches of a session that are checked, of 0.1 ms each
_SMALL_SECONDS = 10.0  # for all smaller batches, which an engine on a CPU has no need of


class Sut:
    """Sessions of one or more engines, which pull batches from one queue.

    LoadGen's thread only puts samples into the queue; the threads of each `_Lane` do the rest. The
    first error, whoever meets it, completes all outstanding samples with empty data, and every
    later one too, so that LoadGen comes to an end; a sample is completed exactly once whatever
    happens. A session that is lost leaves its batches to the others; only the last one's loss is an
    error.

    Parameters
    ----------
    engines
        One for each device.
    library
        Where the sessions find the samples.
    batch
        Largest batch.
    max_wait_s
        Seconds for which a sample waits for others to fill up its batch.
    streams
        Sessions of each engine.
    one_by_one
        Whether a query comes only after the answer to the last one: a session's first thread then
        takes the result, too, which saves the time that waking up the other one takes.
    check_all
        Whether every batch is checked, or as many as take no time that counts.
    labels
        Largest label of a detection; None: unknown.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        library: SampleLibrary,
        *,
        batch: int,
        max_wait_s: float,
        streams: int = 1,
        one_by_one: bool = False,
        check_all: bool = True,
        labels: int | None = None,
    ) -> None:
        self.library = library
        self.one_by_one = one_by_one
        self.check_all = check_all
        self.labels = labels
        self.batcher = Batcher(batch, max_wait_s)
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.issued = 0
        self.completed = 0
        self.completions: list[Completion] = []
        self.losses: list[str] = []
        self.times = Times()
        self._lock = threading.Lock()
        self._outstanding: set[int] = set()
        self._last_progress = time.monotonic()
        self._ready = threading.Event()
        self._together = threading.Condition(self._lock)
        self._came = 0
        self._lanes = [
            _Lane(self, engine, number, opening)
            for engine, opening in ((engine, threading.Lock()) for engine in engines)
            for number in range(streams)
        ]
        self._working = len(self._lanes)

    @property
    def lost_devices(self) -> tuple[str, ...]:
        """Devices that no session is left on, a GPU with its UUID."""
        left = {lane.device for lane in self._lanes if not lane.lost}
        return tuple(dict.fromkeys(lane.device for lane in self._lanes if lane.device not in left))

    @property
    def warm_up_seconds(self) -> float:
        """Seconds per full batch of the warm-up, all sessions together."""
        times = [lane.warm_up_seconds for lane in self._lanes]
        return 1 / sum(1 / seconds for seconds in times if seconds)

    def loaded(self) -> None:
        """Take notice that samples have been loaded, for queries that come now."""
        self.times.loaded = self._last_progress = time.monotonic()

    def start(self, warm_up: Sequence[int], sizes: Sequence[int] = ()) -> None:
        """Start the sessions, which first run the engines.

        Parameters
        ----------
        warm_up
            QSL indices of the samples of a full batch, which are loaded.
        sizes
            Smaller batches to run before it.
        """
        for lane in self._lanes:
            lane.start(warm_up, sizes)

    def come_together(self) -> bool:
        """Wait until all sessions that are left have come here; False: the test has failed."""
        with self._together:
            self._came += 1
            self._together.notify_all()
            self._together.wait_for(lambda: self.failure or self._came >= self._working)
            return self.failure is None

    def wait_ready(self, timeout: float) -> bool:
        """Wait for the end of all warm-ups, or a failure."""
        return self._ready.wait(timeout)

    def issue(self, samples: Sequence[Any]) -> None:
        """Take a query; LoadGen's IssueQuery. Never blocks, never raises."""
        try:
            now = time.monotonic()
            ids = [sample.id for sample in samples]
            indices = [sample.index for sample in samples]
            with self._lock:
                accepted = self.failure is None
                if accepted:
                    self.times.first_query = self.times.first_query or now
                    self.times.last_query = now
                    self.times.before_last = self.times.last_completion
                    if not self._outstanding:
                        self._last_progress = now
                    self._outstanding.update(ids)
                    self.issued += len(ids)
            if accepted:
                self.batcher.put(ids, indices)
            else:
                _complete_empty(ids)
        except BaseException as error:
            self.fail(error)

    def complete(self, batch: Batch, took: float, rows: NDArray[Any], sizes: Sequence[int]) -> None:
        """Give LoadGen the responses of a batch; see `harness.loadgen.response.pack`."""
        starts = accumulate(sizes, initial=rows.ctypes.data)
        responses = list(map(lg.QuerySampleResponse, batch.ids, starts, sizes))
        with self._lock:
            if self.failure is not None:  # somebody else has completed them already
                return
            self._outstanding.difference_update(batch.ids)
            self.completed += len(responses)
            self.times.last_completion = self._last_progress = time.monotonic()
            self.completions.append(Completion(self._last_progress, took, batch.arrivals))
        # LoadGen copies the data before it returns, and `rows` lives at least until then
        lg.QuerySamplesComplete(responses)
        self.times.handed_over = time.monotonic()

    def fail(self, error: BaseException) -> None:
        """End the test: keep the first error and complete what is outstanding with empty data."""
        with self._lock:
            if self.failure is None:
                self.failure = error
            ids = list(self._outstanding)
            self._outstanding.clear()
            self._together.notify_all()
        self.batcher.close()
        _complete_empty(ids)
        self._ready.set()

    def warmed_up(self) -> None:
        """Look whether all sessions that are left are ready."""
        with self._lock:
            ready = all(lane.warm_up_seconds or lane.lost for lane in self._lanes)
        if ready:
            self._ready.set()

    def lose(self, lane: _Lane, error: SessionLostError) -> None:
        """Go on without a session, if there are others."""
        with self._lock:
            self._working -= 1
            left = self._working
            self.losses.append(f"{lane.name} was lost, {left} of {len(self._lanes)} left: {error}")
            self._together.notify_all()
        if not left:
            self.fail(error)
        self.warmed_up()  # the others may be

    def idle_for(self) -> float:
        """Seconds for which no sample has come or been due; 0 while one is due."""
        with self._lock:
            if self._outstanding or not self.times.loaded:  # LoadGen has still to load
                return 0.0
            return time.monotonic() - self._last_progress

    def stalled_for(self) -> float:
        """Seconds without progress: of the slowest session's, or of all while samples are due."""
        now = time.monotonic()
        with self._lock:
            due = now - self._last_progress if self._outstanding else 0.0
        return max(due, *(lane.busy_for(now) for lane in self._lanes))

    def stop(self, timeout: float) -> None:
        """Let the sessions end after what they have; one that blocks is left behind."""
        self.batcher.close()
        self.ended.set()
        deadline = time.monotonic() + timeout
        for lane in self._lanes:
            lane.join(deadline)


def _complete_empty(ids: Sequence[int]) -> None:
    if ids:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(item, 0, 0) for item in ids])


class _Lane:
    """A session: a thread that submits batches, and one that takes and completes their results."""

    def __init__(self, sut: Sut, engine: Engine, number: int, opening: threading.Lock) -> None:
        device = str(engine.manifest.get("device", engine.manifest.get("backend")))
        gpu = engine.manifest.get("running_on")
        self.device = f"{device} ({gpu['uuid']})" if isinstance(gpu, Mapping) else device
        self.name = f"session {number} on {self.device}"
        self.warm_up_seconds = 0.0
        self._sut = sut
        self._engine = engine
        self._opening = opening
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
                    self._warm_up(session, warm_up, sizes)
                    self._thread(self._take_results, session)
                    self._sut.warmed_up()
                    try:
                        self._submit_batches(session)
                    except BaseException as error:  # told before waiting for the other thread
                        self._sut.fail(error)
                    self._in_flight.put(None)
                    self._drained.wait()
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
            if sut.one_by_one:
                self._finish(session, batch, started)
            else:
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
        seconds = self._took_result() - started
        self._slots.put(None)  # the arrays are valid until the next result is taken
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

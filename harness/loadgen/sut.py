"""The system under test: LoadGen's queries in, batches through the engines, responses out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlperf_loadgen as lg
from numpy.typing import NDArray

from engine.errors import SessionLostError
from engine.protocol import Engine
from harness.loadgen.batcher import Batch, Batcher, Completion
from harness.loadgen.clock import Times
from harness.loadgen.lane import Lane
from harness.loadgen.qsl import SampleLibrary
from harness.loadgen.response import ANY_LABEL


class Sut:
    """Sessions of one or more engines, which pull batches from one queue.

    LoadGen's thread puts samples into the queue, and the threads of each `Lane` do the rest; where
    a query comes only after the answer to the last one, it runs the query itself. The
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
        Whether a query comes only after the answer to the last one: LoadGen's own thread then runs
        it, on the first session that is left, which saves the time that waking up another takes.
    check_all
        Whether every batch is checked, or as many as take no time that counts.
    labels
        Those that a detection may have.
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
        labels: range = ANY_LABEL,
    ) -> None:
        self.library = library
        self.one_by_one = one_by_one
        self.check_all = check_all
        self.labels = labels
        self.batcher = Batcher(batch, max_wait_s)
        self._batch = batch
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
            Lane(self, engine, number, opening)
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
        """Seconds per full batch of the warm-up, of all sessions that are to work together."""
        times = [lane.warm_up_seconds for lane in self._lanes if lane.warm_up_seconds]
        return times[0] if self.one_by_one else 1 / sum(1 / seconds for seconds in times)

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
        """Take a query; LoadGen's IssueQuery. Never raises, and blocks only for `one_by_one`."""
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
            if not accepted:
                _complete_empty(ids)
            elif self.one_by_one and len(ids) <= self._batch:
                # the next query comes only after this one: no other thread need wake up for it
                lane = next(lane for lane in self._lanes if not lane.lost)
                lane.run(Batch(ids, indices, [now] * len(ids)))
            else:
                self.batcher.put(ids, indices)
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

    def lose(self, lane: Lane, error: SessionLostError) -> None:
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

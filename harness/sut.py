"""The system under test: LoadGen's queries in, batches through an engine, responses out."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlperf_loadgen as lg
import numpy as np
from numpy.typing import NDArray

from engine.protocol import DETECTION_FIELDS, Engine, EngineError
from harness.qsl import SampleLibrary

_Query = tuple[list[int], list[int]]
"""Response ids and QSL indices."""

_ROW_BYTES = DETECTION_FIELDS * np.dtype(np.float32).itemsize
_WARM_UP_SECONDS = 2.0


class Sut:
    """One worker thread that batches samples, runs the engine and completes the samples.

    LoadGen's thread only puts queries into a queue. The first error, whoever meets it, completes
    all outstanding samples with empty data, and every later one too, so that LoadGen comes to an
    end; a sample is completed exactly once whatever happens.

    Parameters
    ----------
    engine
        Its session is opened and used in the worker thread.
    library
        Where the worker finds the samples.
    batch
        Largest batch.
    max_wait_s
        Seconds for which a batch that is not full waits for more samples.
    """

    def __init__(
        self, engine: Engine, library: SampleLibrary, *, batch: int, max_wait_s: float
    ) -> None:
        self._engine = engine
        self._library = library
        self._batch = batch
        self._max_wait_s = max_wait_s
        self._queue: queue.SimpleQueue[_Query | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding: set[int] = set()
        self._last_progress = time.monotonic()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._worker: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.warm_up_seconds = 0.0
        self.issued = 0
        self.completed = 0
        self.batch_seconds: list[float] = []

    def start(self, warm_up: NDArray[np.generic]) -> None:
        """Start the worker, which first runs the engine on the images of one full batch."""
        self._worker = threading.Thread(target=self._work, args=(warm_up,), name="sut", daemon=True)
        self._worker.start()

    def wait_ready(self, timeout: float) -> bool:
        """Wait for the end of the warm-up (`warm_up_seconds` per batch) or a failure."""
        return self._ready.wait(timeout)

    def issue(self, samples: Sequence[Any]) -> None:
        """Take a query; LoadGen's IssueQuery. Never blocks, never raises."""
        try:
            ids = [sample.id for sample in samples]
            indices = [sample.index for sample in samples]
            with self._lock:
                accepted = self.failure is None
                if accepted:
                    if not self._outstanding:
                        self._last_progress = time.monotonic()
                    self._outstanding.update(ids)
                    self.issued += len(ids)
            if accepted:
                self._queue.put((ids, indices))
            else:
                _complete_empty(ids)
        except BaseException as error:
            self.fail(error)

    def flush(self) -> None:
        """LoadGen's FlushQueries: nothing is held back, so there is nothing to do."""

    def fail(self, error: BaseException) -> None:
        """End the test: keep the first error and complete what is outstanding with empty data."""
        with self._lock:
            if self.failure is None:
                self.failure = error
            ids = list(self._outstanding)
            self._outstanding.clear()
        _complete_empty(ids)
        self._ready.set()

    def stalled_for(self) -> float:
        """Seconds without any completed sample while some are outstanding; else 0."""
        with self._lock:
            return time.monotonic() - self._last_progress if self._outstanding else 0.0

    def stop(self, timeout: float) -> None:
        """Let the worker end after what it has; one that blocks is left behind."""
        self._queue.put(None)
        self._ended.set()
        if self._worker is not None:
            self._worker.join(timeout)

    def _work(self, warm_up: NDArray[np.generic]) -> None:
        try:
            with contextlib.closing(self._engine.session()) as session:
                self.warm_up_seconds = _warm_up(session, warm_up)
                self._ready.set()
                for ids, indices in self._batches():
                    images = self._library.batch(indices)
                    start = time.perf_counter()
                    detections, counts = session.infer(images)
                    self.batch_seconds.append(time.perf_counter() - start)
                    check_outputs(detections, counts, len(indices))
                    self._complete(ids, *pack(detections, counts, indices))
                    if self.failure is not None:
                        break
        except BaseException as error:
            self.fail(error)
        # LoadGen's logger may still read what this thread logged, and crashes when it is gone
        self._ended.wait()

    def _batches(self) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
        while (query := self._queue.get()) is not None:
            ids, numbers = self._gather(query)
            indices = np.array(numbers, np.int64)
            for start in range(0, len(ids), self._batch):
                yield ids[start : start + self._batch], indices[start : start + self._batch]

    def _gather(self, query: _Query) -> _Query:
        """Add queries to the first one until a batch is full or its waiting time is over."""
        ids, indices = query
        deadline = time.monotonic() + self._max_wait_s
        while len(ids) < self._batch:
            remaining = deadline - time.monotonic()
            try:
                if remaining > 0:
                    more = self._queue.get(timeout=remaining)
                else:
                    more = self._queue.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._queue.put(None)
                break
            ids, indices = ids + more[0], indices + more[1]
        return ids, indices

    def _complete(
        self, ids: list[int], rows: NDArray[np.float32], sizes: NDArray[np.int64]
    ) -> None:
        ends = np.cumsum(sizes)
        starts = (rows.ctypes.data + ends - sizes).tolist()
        responses = [
            lg.QuerySampleResponse(*response)
            for response in zip(ids, starts, sizes.tolist(), strict=True)
        ]
        with self._lock:
            if self.failure is not None:  # somebody else has completed them already
                return
            self._outstanding.difference_update(ids)
            self.completed += len(ids)
            self._last_progress = time.monotonic()
        # LoadGen copies the data before it returns, and `rows` lives at least until then
        lg.QuerySamplesComplete(responses)


def check_outputs(detections: NDArray[np.float32], counts: NDArray[np.int32], batch: int) -> None:
    """Check what an engine returned for a batch.

    Raises
    ------
    EngineError
        When dtype or shape is not the protocol's, a count is out of range, or a valid row is not
        finite.
    """
    if detections.dtype != np.float32 or counts.dtype != np.int32:
        raise EngineError(
            f"the engine returned {detections.dtype} detections and {counts.dtype} counts; "
            "float32 and int32 expected"
        )
    if (
        detections.ndim != 3
        or detections.shape[::2] != (batch, DETECTION_FIELDS)
        or counts.shape != (batch,)
    ):
        raise EngineError(
            f"the engine returned detections {detections.shape} and counts {counts.shape} for "
            f"{batch} images; ({batch}, keepTopK, {DETECTION_FIELDS}) and ({batch},) expected"
        )
    if counts.min() < 0 or counts.max() > detections.shape[1]:
        raise EngineError(
            f"the engine returned a count of {counts.min()}..{counts.max()} detections; "
            f"0..{detections.shape[1]} possible"
        )


def pack(
    detections: NDArray[np.float32], counts: NDArray[np.int32], indices: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Valid detections of a batch as MLPerf's response payloads.

    Parameters
    ----------
    detections
        float32 [N, keepTopK, 7], see `engine.protocol.Session.infer`.
    counts
        int32 [N], valid rows per image.
    indices
        int64 [N], QSL indices; below 2**24 they are exact in float32.

    Returns
    -------
    rows
        float32 [sum(counts), 7], one image after the other: QSL index, ymin, xmin, ymax, xmax,
        score, label.
    sizes
        int64 [N], bytes of each image's payload in `rows`.

    Raises
    ------
    EngineError
        When a valid row holds a NaN or an infinity.
    """
    rows = detections[np.arange(detections.shape[1]) < counts[:, None]]
    if not np.isfinite(rows).all():
        raise EngineError("the engine returned NaN or infinite detections")
    rows[:, 0] = np.repeat(indices, counts)
    return rows, counts.astype(np.int64) * _ROW_BYTES


def _warm_up(session: Any, images: NDArray[np.generic]) -> float:
    """Seconds of the fastest of some runs; the first, which is slower, counts only if alone."""
    begin = time.perf_counter()
    seconds: list[float] = []
    while not seconds or (len(seconds) < 5 and time.perf_counter() - begin < _WARM_UP_SECONDS):
        start = time.perf_counter()
        detections, counts = session.infer(images)
        seconds.append(time.perf_counter() - start)
        check_outputs(detections, counts, len(images))
    return max(min(seconds), 1e-6)


def _complete_empty(ids: Sequence[int]) -> None:
    if ids:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(item, 0, 0) for item in ids])

"""The queue between LoadGen and the sessions: single samples in, batches out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_Sample = tuple[int, int, float]
"""Response id, QSL index, and when it came (`time.monotonic`)."""


@dataclass(frozen=True)
class Batch:
    """Samples that go through an engine together.

    Attributes
    ----------
    ids
        LoadGen's response ids.
    indices
        QSL indices.
    arrivals
        When each sample came, in seconds of `time.monotonic`.
    """

    ids: Sequence[int]
    indices: Sequence[int]
    arrivals: Sequence[float]


class Completion(NamedTuple):
    """A batch that is done: when, its seconds in the engine, and when each sample came.

    Times are seconds of `time.monotonic`.
    """

    time: float
    batch_seconds: float
    arrivals: Sequence[float]


class Batcher:
    """Samples in the order in which they came, handed out in batches; for any number of threads.

    A batch goes out when it is full, or when its first sample has waited for long enough.

    Parameters
    ----------
    batch
        Samples of a full batch.
    max_wait_s
        Seconds that a sample waits at most for others, if a taker is there.
    """

    def __init__(self, batch: int, max_wait_s: float) -> None:
        self._batch = batch
        self._max_wait_s = max_wait_s
        self._samples: deque[_Sample] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._closed = False

    def put(self, ids: Sequence[int], indices: Sequence[int]) -> None:
        """Add samples; once closed, they are dropped."""
        arrival = time.monotonic()
        with self._changed:
            if self._closed:
                return
            first = not self._samples
            self._samples.extend([(*sample, arrival) for sample in zip(ids, indices, strict=True)])
            # in between, whoever waits for the batch to fill up need not wake up
            if first or len(self._samples) >= self._batch:
                self._changed.notify()

    def put_back(self, batch: Batch) -> None:
        """Add a batch that was taken and not done, in front of all others."""
        with self._changed:
            if not self._closed:
                samples = list(zip(batch.ids, batch.indices, batch.arrivals, strict=True))
                self._samples.extendleft(reversed(samples))
                self._changed.notify_all()

    def take(self) -> Batch | None:
        """Wait for the next batch; None: there will be none any more."""
        with self._changed:
            while not self._closed:
                if not self._samples:
                    self._changed.wait()
                    continue
                count = min(len(self._samples), self._batch)
                if count < self._batch and self._max_wait_s:
                    left = self._samples[0][2] + self._max_wait_s - time.monotonic()
                    if left > 0:
                        self._changed.wait(left)
                        continue
                taken = [self._samples.popleft() for _ in range(count)]
                if self._samples:
                    self._changed.notify()
                return Batch(*zip(*taken, strict=True))
        return None

    def close(self) -> None:
        """Let everybody who waits end; what was not taken is dropped."""
        with self._changed:
            self._closed = True
            self._samples.clear()
            self._changed.notify_all()

"""Engines and data for the harness tests; as a program, one run with an engine that misbehaves.

``python -m tests.support.harness_fakes FAULT DIRECTORY [SCENARIO MODE TIMEOUT STREAMS]``
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from engine.backends.blocking import BlockingSession
from engine.errors import EngineError, SessionLostError
from engine.protocol import InputSpec
from harness.loadgen.log import ACCURACY
from harness.loadgen.settings import load_settings
from harness.results.run import Benchmark

SHAPE = (3, 4, 4)
KEEP = 5
TOTAL = 75  # no multiple of a batch, nor of the 20 samples in memory
BATCHES_BEFORE_FAULT = 12  # more than any warm-up takes


class Memory:
    """Sample i is an image full of i."""

    def __init__(self, total: int, shape: tuple[int, int, int] = SHAPE) -> None:
        self.files = tuple(f"{i:06d}.jpg" for i in range(total))
        self._shape = shape

    def read_into(self, batch, indices):
        assert batch.shape == (len(indices), *self._shape)
        batch[:] = np.array(indices, np.float32)[:, None, None, None]


def detect(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image full of i: i % (KEEP + 1) boxes whose numbers follow from i."""
    value = images[:, 0, 0, 0]
    counts = (value.astype(np.int32)) % (KEEP + 1)
    detections = np.zeros((len(images), KEEP, 7), np.float32)
    rank = np.arange(KEEP, dtype=np.float32)
    detections[..., 0] = np.arange(len(images))[:, None]
    detections[..., 1] = value[:, None] / 1000
    detections[..., 3] = 1 - value[:, None] / 1000
    detections[..., 4] = 0.9
    detections[..., 5] = 1 / (1 + rank)
    detections[..., 6] = 1 + (value[:, None] + rank) % 80
    unused = rank >= counts[:, None]
    detections[unused, 1:6] = 0
    detections[unused, 6] = -1
    return detections, counts


def _with(detections, column, values):
    """The same detections with other values in a column, or several."""
    changed = detections.copy()
    changed[..., column] = values
    return changed


WRONG = {
    "nan": lambda d, c: (_with(d, 5, np.nan), np.ones_like(c)),
    "shape": lambda d, c: (d[..., :6], c),
    "dtype": lambda d, c: (d.astype(np.float64), c),
    "count": lambda d, c: (d, np.full_like(c, KEEP + 1)),
    "images": lambda d, c: (d[::-1].copy(), c[::-1].copy()),
    "fraction": lambda d, c: (_with(d, 6, d[..., 6] + 0.5), c),
    "background": lambda d, c: (_with(d, 6, 0), c),
    "label": lambda d, c: (_with(d, 6, 81), c),
    "scores": lambda d, c: (_with(d, 5, d[:, ::-1, 5]), c),
    "corners": lambda d, c: (_with(d, [1, 3], d[..., [3, 1]]), c),
}
"""Kinds of wrong answers, each from the right one."""


def short(scenario, **more):
    """Settings of a run that LoadGen ends after a twentieth of a second."""
    values = {"min_duration_ms": 50, "min_query_count": 10, "performance_sample_count": 20}
    targets = {"target_qps": 2000.0} if scenario == "Server" else {}
    return load_settings([scenario], None, {**values, **targets, **more})[0]


def benchmark(*engines, timeout_s=30):
    """The engines on `TOTAL` samples."""
    return Benchmark(engines, Memory(TOTAL), None, timeout_s)


def assert_complete(directory):
    """The log holds, for every sample, what the engine says to it when asked alone."""
    log = json.loads((directory / ACCURACY).read_text())
    assert {entry["qsl_idx"] for entry in log} == set(range(TOTAL))
    for entry in log:
        index = entry["qsl_idx"]
        detections, counts = detect(np.full((1, *SHAPE), index, np.float32))
        rows = detections[0, : counts[0]]
        rows[:, 0] = index
        assert entry["data"] == rows.astype("<f4").tobytes().hex().upper()


@dataclass
class FakeEngine:
    """Detects at once; notes the batch sizes it is given, then does what `fault` says."""

    max_batch: int | None = None
    fault: str = ""
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)
    closed: bool = False

    input_spec = InputSpec("image", SHAPE, "float32")
    manifest = {"backend": "fake"}  # noqa: RUF012

    def session(self):
        session = BlockingSession(lambda _: None, self.infer)
        session.close = self.close
        return session

    def host_array(self, shape, dtype):
        return np.empty(shape, dtype)

    def close(self):
        self.closed = True

    def infer(self, images):
        assert self.max_batch is None or len(images) <= self.max_batch
        self.batches.append(len(images))
        time.sleep(self.seconds)
        detections, counts = detect(images)
        if self.fault == "warm-up" or len(self.batches) > BATCHES_BEFORE_FAULT:
            match self.fault:
                case "raise" | "warm-up":
                    raise RuntimeError("no more\nmemory")
                case "nothing":
                    return None
                case "block":
                    time.sleep(1e6)
                case str(step) if step.startswith("clock "):
                    ctypes.CDLL(None).set_wall_clock(int(step.removeprefix("clock ")))
                case wrong if wrong in WRONG:
                    return WRONG[wrong](detections, counts)
        return detections, counts


class PipelinedSession:
    """Works in a thread of its own, and holds its caller to the protocol."""

    def __init__(self, engine: PipelinedEngine, faulty: bool) -> None:
        self.depth = engine.depth
        self.batches: list[int] = []
        self.most_in_flight = 0
        self.taken = 0
        self.closed = False
        self._engine = engine
        self._fault = engine.fault if faulty else ""
        self._in_flight: deque[int] = deque()
        self._given: SimpleQueue = SimpleQueue()
        self._done: SimpleQueue = SimpleQueue()
        self._last = (np.empty(0), np.empty(0))
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, images):
        self._fail("submit")
        self.batches.append(sum(map(len, images)))
        assert self.batches[-1] <= self._engine.max_batch
        self._in_flight.append(len(self.batches))
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        if len(self._in_flight) > self.depth:
            raise EngineError("too many batches in flight")
        self._given.put(images)

    def result(self):
        self._last[0].fill(np.nan)  # no longer the caller's
        self._last[1].fill(-1)
        self._fail("result")
        self._last = self._done.get()
        self.taken += 1
        self._in_flight.popleft()
        return self._last

    def close(self):
        self.closed = True
        self._given.put(None)

    def _work(self):
        while (images := self._given.get()) is not None:
            time.sleep(self._engine.seconds)
            whole = np.concatenate(images)
            del images  # it is the caller's, who may want its memory back after the result
            self._done.put(detect(whole))

    def _fail(self, where):
        fault, _, place = self._fault.partition(" in ")
        done = self.taken if where == "result" else len(self.batches)
        if place != where or done < self._engine.batches_before_fault:
            return
        if fault == "block":
            time.sleep(1e6)
        raise {
            "error": RuntimeError("no more\nluck"),
            "memory": EngineError("CUDA: out of memory (cudaErrorMemoryAllocation)"),
            "lost": SessionLostError("the GPU has fallen off the bus"),
        }[fault]


@dataclass
class PipelinedEngine:
    """Opens sessions with several batches in flight; the first, or all, do what `fault` says."""

    depth: int = 2
    seconds: float = 0.001
    fault: str = ""  # "error", "memory", "lost" or "block" in "submit" or "result"; "lost in open"
    all_faulty: bool = False
    batches_before_fault: int = BATCHES_BEFORE_FAULT + 10
    device: str = "fake:0"
    max_batch: int = 16
    sessions: list[PipelinedSession] = field(default_factory=list)
    lost: bool = False
    more: dict = field(default_factory=dict)  # of its manifest

    input_spec = InputSpec("image", SHAPE, "float32")

    @property
    def manifest(self):
        return {"backend": "fake", "onnx_sha256": "00", "device": self.device, **self.more}

    def session(self):
        faulty = self.all_faulty or not self.sessions
        if faulty and self.fault == "lost in open" and not self.lost:
            self.lost = not self.all_faulty
            raise SessionLostError("the GPU has fallen off the bus")
        session = PipelinedSession(self, faulty and not self.lost)
        self.sessions.append(session)
        return session

    def host_array(self, shape, dtype):
        return np.empty(shape, dtype)


def on_gpu(number, **engine):
    """An engine that seems to run on a GPU, whose kernels are its own."""
    gpu = {
        "index": number,
        "name": "NVIDIA H200",
        "uuid": f"GPU-{number}",
        "pci": f"{number}b:00.0",
    }
    more = {"gpu": "NVIDIA H200", "kernels": {"conv": str(number)}, "running_on": gpu}
    return PipelinedEngine(device=f"fake:{number}", more=more, **engine)


class BrokenMemory(Memory):
    """Its disk goes away once LoadGen asks for samples."""

    def read_into(self, batch, indices):
        if len(indices) > 8:
            raise OSError(5, "Input/output error", "000000.jpg.npy")
        super().read_into(batch, indices)


def main(fault, directory, *rest):
    from harness.errors import HarnessError, RunFailedError
    from harness.loadgen import test
    from harness.results.run import run

    test._GRACE_SECONDS = 0.2  # what blocks here blocks for good
    test._IDLE_SECONDS = 5.0

    defaults = ("Offline", "PerformanceOnly", "60", "1")
    scenario, mode, timeout, streams = (*rest, *defaults[len(rest) :])
    (settings,) = load_settings(
        [scenario],
        None,
        {
            "min_duration_ms": 200,
            "min_query_count": 1 if scenario != "Offline" else 2000,
            "target_qps": 2000.0 if scenario in ("Offline", "Server") else None,
            "streams": int(streams),
        },
    )
    source = BrokenMemory(100) if fault == "load" else Memory(100)
    if " in " in fault:
        engine = PipelinedEngine(fault=fault)
    else:
        engine = FakeEngine(fault=fault, seconds=0.02 if fault == "slow" else 0.0005)
    under_test = Benchmark((engine,), source, None, float(timeout))
    sys.stdout.write("start\n")
    sys.stdout.flush()
    try:
        run(under_test, settings, mode, Path(directory))
    except RunFailedError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(error.exit_code)
    except HarnessError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Engines and data for the harness tests; as a program, one run with an engine that misbehaves.

``python tests/harness_fakes.py FAULT DIRECTORY [SCENARIO MODE TIMEOUT]``
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.backends.blocking import BlockingSession
from engine.protocol import InputSpec

SHAPE = (3, 4, 4)
KEEP = 5
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
                case "nan":
                    detections[..., 5] = np.nan
                    counts[:] = 1
                case "shape":
                    detections = detections[..., :6]
                case "dtype":
                    detections = detections.astype(np.float64)
                case "count":
                    counts[:] = KEEP + 1
                case "nothing":
                    return None
                case "block":
                    time.sleep(1e6)
        return detections, counts


class BrokenMemory(Memory):
    """Its disk goes away once LoadGen asks for samples."""

    def read_into(self, batch, indices):
        if len(indices) > 8:
            raise OSError(5, "Input/output error", "000000.jpg.npy")
        super().read_into(batch, indices)


def main(fault: str, directory: str, scenario="Offline", mode="PerformanceOnly", timeout="60"):
    from harness.errors import HarnessError
    from harness.loadgen import RunFailedError
    from harness.run import Benchmark, run
    from harness.settings import load_settings

    (settings,) = load_settings(
        [scenario],
        None,
        {
            "min_duration_ms": 200,
            "min_query_count": 1 if scenario != "Offline" else 2000,
            "target_qps": 2000.0 if scenario in ("Offline", "Server") else None,
        },
    )
    source = BrokenMemory(100) if fault == "load" else Memory(100)
    engine = FakeEngine(fault=fault, seconds=0.02 if fault == "slow" else 0.0005)
    benchmark = Benchmark((engine,), source, None, float(timeout))
    sys.stdout.write("start\n")
    sys.stdout.flush()
    try:
        run(benchmark, settings, mode, Path(directory))
    except RunFailedError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(error.exit_code)
    except HarnessError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(*sys.argv[1:])

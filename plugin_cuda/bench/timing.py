"""Times of GPU work by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Call = Callable[[], object]

_AHEAD = 20
"""Runs that are enqueued behind a pause, so that the GPU never waits for the host."""

_PAUSE_CYCLES = 3_000_000
"""Length of the pause, about 2 ms."""


@dataclass(frozen=True)
class Times:
    """Microseconds of a run: median, 10th and 90th percentile; how many runs."""

    median: float
    p10: float
    p90: float
    runs: int


def measure(calls: Sequence[Call], *, seconds: float, ahead: bool = True) -> Times:
    """Time single runs, taking the calls in turn.

    Parameters
    ----------
    calls
        The same work on different inputs.
    seconds
        About how long to measure.
    ahead
        Enqueue runs before the GPU gets to them, so that the time is the GPU's alone. Not for work
        that waits for the GPU itself.
    """
    import torch

    cuda: Any = torch.cuda  # parts of it have no types
    group = _AHEAD if ahead else 1
    for call in calls[:2]:
        call()
    cuda.synchronize()
    begin = time.perf_counter()
    calls[-1]()
    cuda.synchronize()
    groups = int(seconds / max(time.perf_counter() - begin, 1e-5) / group)
    found: list[float] = []
    for turn in range(min(max(groups, 2), 400 // group)):
        if ahead:
            cuda._sleep(_PAUSE_CYCLES)
        events = []
        for i in range(group):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[(turn * group + i) % len(calls)]()
            end.record()
            events.append((start, end))
        cuda.synchronize()
        found += [1e3 * start.elapsed_time(end) for start, end in events]
    p10, median, p90 = np.percentile(found, [10, 50, 90]).tolist()
    return Times(median, p10, p90, len(found))


def captured(call: Call, pool: Any) -> Call:
    """Record a call as a CUDA graph; return its replay. It has to have run once before."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    times = measure([lambda: target.copy_(source)], seconds=0.3)
    return 2 * source.numel() / (times.median * 1e-6)

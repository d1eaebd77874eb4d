"""How fast a session is, from images in the host's memory to detections there."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.protocol import Session


def throughput(
    session: Session, images: NDArray[Any], size: int, seconds: float
) -> dict[str, float]:
    """Images a second with as many batches in flight as the session takes."""
    batches = batches_of(images, size)
    for _ in range(3):
        session.submit(batches[0])
        session.result()
    flying = done = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        session.submit(batches[done % len(batches)])
        flying += 1
        if flying == session.depth:
            session.result()
            flying -= 1
            done += 1
    for _ in range(flying):
        session.result()
        done += 1
    return {"images_per_s": done * size / (time.perf_counter() - start)}


def latency(session: Session, images: NDArray[Any], size: int, seconds: float) -> dict[str, float]:
    """Milliseconds from before a batch is submitted until its detections are there."""
    batches = batches_of(images, size)
    turns: list[float] = []
    end = time.perf_counter() + seconds
    while len(turns) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        session.submit(batches[len(turns) % len(batches)])
        session.result()
        turns.append(1e3 * (time.perf_counter() - start))
    p50, p99 = np.percentile(turns, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "turns": len(turns)}


def batches_of(images: NDArray[Any], size: int) -> list[list[NDArray[Any]]]:
    """Batches that go round the images, as runs of neighbours."""
    if size > len(images):
        whole, rest = divmod(size, len(images))
        return [[images] * whole + ([images[:rest]] if rest else [])]
    return [[images[at : at + size]] for at in range(0, len(images) - size + 1, size)]

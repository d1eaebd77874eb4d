"""Places for buffers in one block of memory: those that are never needed together share bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes; cudaMalloc's own (CUDA C++ Programming Guide, device memory accesses)."""


@dataclass(frozen=True)
class Need:
    """A buffer of `size` bytes that is needed from step `first` to step `last`, both included."""

    name: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """Offsets in bytes by the buffers' names, and the size of the block."""

    offsets: dict[str, int]
    size: int


def plan_arena(needs: Sequence[Need]) -> Arena:
    """Place buffers, the largest first, each at the lowest offset that is free while it is needed.

    Parameters
    ----------
    needs
        Buffers of different names.
    """
    offsets: dict[str, int] = {}
    placed: list[Need] = []
    for need in sorted(needs, key=lambda one: -one.size):
        neighbours = [o for o in placed if o.first <= need.last and need.first <= o.last]
        offset = 0
        for other in sorted(neighbours, key=lambda one: offsets[one.name]):
            if offset + need.size <= offsets[other.name]:
                break
            offset = max(offset, aligned(offsets[other.name] + other.size))
        offsets[need.name] = offset
        placed.append(need)
    size = max((offsets[one.name] + one.size for one in placed), default=0)
    return Arena(offsets, aligned(size))


def aligned(size: int) -> int:
    """Bytes up to the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT

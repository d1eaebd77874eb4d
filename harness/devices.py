"""The engines of a run: one for each GPU that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.load import load_engine
from engine.protocol import Engine
from harness.errors import HarnessError


def parse_devices(text: str) -> tuple[int, ...]:
    """Numbers of GPUs, as ``0,1``.

    Raises
    ------
    HarnessError
        When it is no such list, or names a GPU twice.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise HarnessError(f"--devices {text!r}: numbers of GPUs expected, as 0 or 0,1")
    numbers = tuple(map(int, words))
    if len(set(numbers)) < len(numbers):
        raise HarnessError(f"--devices {text!r} names a GPU twice; see --streams")
    return numbers


def load_engines(
    backend: str,
    model: Path,
    *,
    device: str | None,
    devices: Sequence[int] | None,
    threads: int | None,
) -> tuple[Engine, ...]:
    """Load a model on every device.

    Parameters
    ----------
    backend, model, threads
        See `engine.load.load_engine`.
    device
        See `engine.load.load_engine`; with `devices`, ``cuda`` or None.
    devices
        Numbers of GPUs; None: `device` alone.

    Raises
    ------
    HarnessError
        When GPUs are numbered for another device than ``cuda``.
    EngineError
        When an engine cannot be loaded.
    """
    names: list[str | None]
    if devices is None:
        names = [device]
    elif device in {None, "cuda"}:
        names = [f"cuda:{number}" for number in devices]
    else:
        raise HarnessError(f"--devices chooses GPUs, but the device is {device}")
    return tuple(load_engine(backend, model, device=name, threads=threads) for name in names)

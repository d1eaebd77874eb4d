"""Files that several tests need, made once, be they run by one process or by several."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path` as `make` writes it: one process does, the others wait and find it there."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path

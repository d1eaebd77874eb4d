"""What must be undone when the process ends, also where it ends by ``os._exit``."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)

_undo: list[weakref.WeakMethod[Any]] = []


def on_leaving(undo: Callable[[], object]) -> None:
    """Have a method called when the process ends, if its object still exists; it may not raise."""
    _undo.append(weakref.WeakMethod(undo))


@atexit.register
def _run() -> None:
    while _undo:
        undo = _undo.pop()()
        if undo is not None:
            undo()


def end_with_parent() -> None:
    """Have the kernel end this process with its parent, however that ends; for `preexec_fn`."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_now(exit_code: int) -> NoReturn:
    """End the process without waiting for its threads."""
    _run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)

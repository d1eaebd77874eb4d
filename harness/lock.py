"""One process at a time in a folder: a route in its build folder, a run in that of its logs."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.support.environment import command_line, now
from harness.errors import HarnessError

LOCK = "lock"
"""File in the folder; the lock is the kernel's, so it ends with the process that holds it."""


@contextmanager
def locked(folder: Path, *, otherwise: str = "set BUILD_DIR") -> Iterator[None]:
    """Hold a folder, which is made when absent.

    Parameters
    ----------
    folder
        What to hold.
    otherwise
        What the user may do instead of waiting, for the messages.

    Raises
    ------
    HarnessError
        When somebody else holds it (says who), or nothing can be written there.
    """
    with _held(folder, otherwise) as file:
        yield
        file.truncate(0)


def _held(folder: Path, otherwise: str) -> BinaryIO:
    """Lock file of a folder, locked, with the name of this process in it."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _unwritable(folder, otherwise, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, file):  # its holder gave the folder another name
                file.close()
                continue
            file.truncate(0)
            holder = f"process {os.getpid()} on {platform.node()} since {now()}: {command_line()}\n"
            file.write(holder.encode())
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
            raise HarnessError(
                f"{folder} is in use by {holder}; wait for it, or {otherwise}"
            ) from None
        except OSError as error:
            file.close()
            raise HarnessError(f"{path}: cannot be locked: {error.strerror}") from error
        return file


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _unwritable(folder: Path, otherwise: str, error: OSError) -> HarnessError:
    return HarnessError(
        f"{folder}: cannot write to it ({error.strerror}); make it writable or {otherwise}"
    )

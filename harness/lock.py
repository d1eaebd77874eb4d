"""One process at a time in a folder: a route in its build folder, a run in that of its logs.

The lock is the kernel's, so it ends with the process that holds it. Where a file system has none, a
file that only one process can make stands for it, which a process that is killed leaves behind.
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from engine.support.environment import command_line, now
from engine.support.leaving import on_leaving
from engine.support.locks import lock
from harness.errors import HarnessError

LOCK = "lock"
"""File in the folder that is locked, with the name of the process that holds it."""


@contextmanager
def locked(
    folder: Path, *, otherwise: str = "set BUILD_DIR", file: Path | None = None
) -> Iterator[None]:
    """Hold a folder, which is made when absent.

    Parameters
    ----------
    folder
        What to hold.
    otherwise
        What the user may do instead of waiting, for the messages.
    file
        The file to lock, for a folder that is renamed or removed meanwhile; None: `LOCK` in it.

    Raises
    ------
    HarnessError
        When somebody else holds it (says who), or nothing can be written there.
    """
    path = file or folder / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.open("a+b", buffering=0)
    except OSError as error:
        raise _unwritable(path.parent, otherwise, error) from error
    with held:
        try:
            has_locks = lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if has_locks:
                held.truncate(0)
                held.write(_holder())
        except BlockingIOError:
            held.seek(0)
            raise _in_use(folder, held.read(), f"wait for it, or {otherwise}") from None
        except OSError as error:
            raise HarnessError(f"{path}: cannot be locked: {error.strerror}") from error
        if has_locks:
            yield
            held.truncate(0)
            return
        mark = _Mark(folder, path.with_name(f"{path.name}.held"), otherwise)
        try:
            yield
        finally:
            mark.remove()


class _Mark:
    """A file that stands for a lock."""

    def __init__(self, folder: Path, path: Path, otherwise: str) -> None:
        self._path = path
        try:
            with path.open("xb", buffering=0) as file:
                on_leaving(self.remove)
                file.write(_holder())
        except FileExistsError:
            remedy = f"wait for it, or {otherwise}; where it is gone, remove {path}"
            try:
                holder = path.read_bytes()
            except FileNotFoundError:  # it has just left
                holder = b""
            raise _in_use(folder, holder, remedy) from None
        except OSError as error:
            raise _unwritable(path.parent, otherwise, error) from error
        typer.echo(
            f"warning: the file system of {path.parent} has no locks; {path.name} stands for one, "
            "and stays when this process is killed",
            err=True,
        )

    def remove(self) -> None:
        """Let others in."""
        self._path.unlink(missing_ok=True)


def _holder() -> bytes:
    return f"process {os.getpid()} on {platform.node()} since {now()}: {command_line()}\n".encode()


def _in_use(folder: Path, holder: bytes, remedy: str) -> HarnessError:
    name = holder.decode(errors="replace").strip() or "another process"
    return HarnessError(f"{folder} is in use by {name}; {remedy}")


def _unwritable(folder: Path, otherwise: str, error: OSError) -> HarnessError:
    return HarnessError(
        f"{folder}: cannot write to it ({error.strerror}); make it writable or {otherwise}"
    )

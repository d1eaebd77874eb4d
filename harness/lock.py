"""One route at a time in a build folder."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.support.environment import command_line, now
from harness.errors import HarnessError

LOCK = "lock"
"""File in the build folder; the lock is the kernel's, so it ends with the process that holds it."""


@contextmanager
def locked(build_dir: Path) -> Iterator[None]:
    """Hold a build folder, which is made when absent.

    Raises
    ------
    HarnessError
        When somebody else holds it (says who), or nothing can be written there.
    """
    path = build_dir / LOCK
    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise HarnessError(
            f"{build_dir}: cannot write to the build folder ({error.strerror}); make it writable "
            "or set BUILD_DIR"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise HarnessError(
                f"{build_dir} is in use by {file.read().strip() or 'another process'}; wait for "
                "it, or set BUILD_DIR"
            ) from None
        except OSError as error:
            raise HarnessError(f"{path}: cannot be locked: {error.strerror}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {now()}: {command_line()}\n")
        file.flush()
        yield
        file.truncate(0)

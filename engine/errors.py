"""The room's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EngineError(Exception):
    """A user-visible failure of an engine: what was wrong, where, what to do. One line."""


@contextmanager
def naming(files: object) -> Iterator[None]:
    """Put the names of files before an error of what is in them."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{files}: {error}") from error


def one_line(error: object) -> str:
    """Return what an exception says, in one line."""
    return " ".join(str(error).split())


class SessionLostError(EngineError):
    """A session cannot go on, as when its server or GPU is gone; other sessions may.

    Its batches in flight are not done.
    """

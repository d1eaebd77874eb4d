"""The room's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EngineError


class HarnessError(Exception):
    """A user-visible failure: what was wrong, where, what to do. One line."""


@contextmanager
def as_harness_error() -> Iterator[None]:
    """Turn an `EngineError` into a `HarnessError` of the same words."""
    try:
        yield
    except EngineError as error:
        raise HarnessError(str(error)) from error


class RunFailedError(Exception):
    """A run that started and did not come to a good end. One line.

    LoadGen cannot be stopped, so its threads may still be there, and an ordinary interpreter exit
    would abort in them: a program that does not go on must leave with ``os._exit(exit_code)``.

    Attributes
    ----------
    exit_code
        1, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

"""The room's errors."""

from __future__ import annotations


class HarnessError(Exception):
    """A user-visible failure: what was wrong, where, what to do. One line."""


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

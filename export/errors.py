"""The exception of this room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ExportError(Exception):
    """A user-visible failure: what was wrong, where, what to do. One line per finding."""


@contextmanager
def needed_packages() -> Iterator[None]:
    """Make a user error of a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{error.name} is missing; exporting needs it: pip install 'ssd-resnet34-trt[export]'"
        ) from error

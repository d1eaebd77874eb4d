"""A progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int | None], None]
"""Called with what is done and, where it is known, with what there is to do."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress | None]:
    """Progress bar on stderr; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    text = TextColumn("{task.description}", markup=False)  # file names may hold [ ] and { }
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # no refreshing thread: it would take the GIL from the run ten times a second
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(title, total=None)

        def show(completed: int, total: int | None) -> None:
            bar.update(task, completed=completed, total=total)
            bar.refresh()

        yield show

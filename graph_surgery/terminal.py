"""Where tables are printed: a console that passes on nothing of files that a terminal obeys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from graph_surgery.command import printable


def new_console(**options: Any) -> Console:
    """Make a console that shows control characters of what it prints escaped.

    Names of classes, layers and tensors are whatever somebody wrote into a file, and names of files
    may be anything. Rich's own colours stay.

    Parameters
    ----------
    options
        Of `rich.console.Console`.
    """
    console = Console(**options)
    console.push_render_hook(_Harmless())
    return console


class _Harmless(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(one) for one in renderables]


class _Shown:
    """Something to print, rendered without control characters."""

    def __init__(self, what: ConsoleRenderable) -> None:
        self._what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: Iterable[Segment] = console.render(self._what, options)
        for text, style, control in segments:
            yield Segment(text if control else printable(text), style, control)

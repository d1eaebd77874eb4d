"""Two runs held against each other: their figures with differences, and all else that differs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rich.table import Table
from rich.text import Text

from graph_surgery.terminal import new_console
from harness.errors import HarnessError
from harness.results.report import Runs, find_results, root_of
from harness.results.result import RunResult

_FIGURES = ("latency_ms", "batch_latency_ms", "accuracy", "errors", "warnings", "asked")
"""Fields of a result that are no circumstances of it, or are told by others."""

Key = tuple[str, str]
"""Scenario and mode."""


@dataclass(frozen=True)
class Fact:
    """A circumstance of each of several runs, by its dotted name."""

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether not all runs have the same."""
        return len(set(self.values)) > 1


def facts(runs: Runs) -> list[Fact]:
    """All that identifies runs and how they were made."""
    flat = []
    for directory, result in runs:
        fields = dataclasses.asdict(result)
        for name in _FIGURES:
            del fields[name]
        flat.append(dict(_flat({"folder": str(directory), **fields})))
    names = list(dict.fromkeys(name for one in flat for name in one))
    return [Fact(name, tuple(one.get(name, "–") for one in flat)) for name in names]


def per_cent(before: float, after: float) -> str:
    """Change in per cent; empty where there is none to tell."""
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def two_sides(directories: Sequence[Path]) -> tuple[Runs, Runs]:
    """Runs of two folders; or the two that one folder holds, the older first.

    Raises
    ------
    HarnessError
        When they are not two; names those of one folder.
    """
    if len(directories) > 2:
        raise HarnessError(f"--compare takes two runs, these are {len(directories)}")
    if len(directories) == 2:
        return find_results(directories[:1]), find_results(directories[1:])
    (folder,) = directories
    sides: dict[Path, list[tuple[Path, RunResult]]] = {}
    for directory, result in sorted(find_results(directories), key=lambda one: one[1].finished):
        sides.setdefault(root_of(directory, result), []).append((directory, result))
    if len(sides) != 2:
        newest = " ".join(quote(os.path.relpath(root)) for root in list(sides)[-2:])
        hint = f"; the newest two: harness report --compare {newest}" if len(sides) > 2 else ""
        raise HarnessError(
            f"--compare takes two runs, {folder} holds {len(sides)}{hint or ': name another, too'}"
        )
    first, second = sides.values()
    return first, second


def paired(first: Runs, second: Runs) -> dict[Key, Runs]:
    """Runs of the same scenario and mode.

    Raises
    ------
    HarnessError
        When one side has two of a kind, or no kind is on both sides.
    """
    sides = [_by_kind(side) for side in (first, second)]
    both: dict[Key, Runs] = {
        key: [sides[0][key], sides[1][key]] for key in sides[0] if key in sides[1]
    }
    if not both:
        kinds = (", ".join(" ".join(key) for key in side) for side in sides)
        raise HarnessError(f"no scenario and mode that both have: {' against '.join(kinds)}")
    return both


def figures(result: RunResult) -> dict[str, float]:
    """All that was measured in a run, by the names of the tables."""
    found: dict[str, float | None] = {"samples/s": result.samples_per_second}
    stats = (result.accuracy or {}).get("stats")
    if isinstance(stats, Mapping):
        found |= stats
    elif result.mode == "AccuracyOnly":
        found["AP"] = result.value
    for what, latencies in (("query", result.latency_ms), ("batch", result.batch_latency_ms)):
        found |= {f"{what} {name} ms": value for name, value in latencies.items()}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def print_comparison(first: Runs, second: Runs) -> None:
    """Print a table for each scenario and mode that both have, and what else differs.

    Raises
    ------
    HarnessError
        See `paired`.
    """
    both = paired(first, second)
    console = new_console(markup=False, highlight=False)
    for key, (a, b) in both.items():
        console.print(_table(" ".join(key), a[1], b[1]))
        for side, (_, result) in zip("AB", (a, b), strict=True):
            for message in (*result.errors, *result.warnings):
                console.print(f"  {side}: {message}", soft_wrap=True)
        others = [fact for fact in facts([a, b]) if fact.differs]
        table = Table(title="What differs", title_justify="left")
        for column in ("", "A", "B"):
            table.add_column(column, overflow="fold")
        for fact in others:
            if fact.name not in ("value", "samples_per_second"):
                table.add_row(*map(Text, (fact.name, *fact.values)))
        console.print(table)
    for side, other, runs in (("A", "B", first), ("B", "A", second)):
        for _, result in runs:
            if (result.scenario, result.mode) not in both:
                console.print(
                    f"{side} alone: {result.scenario} {result.mode}, which {other} has not"
                )


def _table(title: str, first: RunResult, second: RunResult) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("A", "B", "B - A", ""):
        table.add_column(column, justify="right", no_wrap=True)
    if first.valid is not None or second.valid is not None:
        words = {True: "VALID", False: "INVALID", None: "–"}
        table.add_row("LoadGen", words[first.valid], words[second.valid], "", "")
    a, b = figures(first), figures(second)
    for name in dict.fromkeys((*a, *b)):
        digits = 2 if name == "samples/s" else 3 if name.endswith(" ms") else 4
        before, after = a.get(name), b.get(name)
        shown = ["–" if value is None else f"{value:.{digits}f}" for value in (before, after)]
        change = ["", ""]
        if before is not None and after is not None:
            change = [f"{after - before:+.{digits}f}", per_cent(before, after)]
        table.add_row(name, *shown, *change)
    return table


def _by_kind(runs: Runs) -> dict[Key, Any]:
    found: dict[Key, Any] = {}
    for directory, result in runs:
        key = result.scenario, result.mode
        if key in found:
            raise HarnessError(
                f"{' '.join(key)} is there twice, in {found[key][0]} and {directory}: name one run"
            )
        found[key] = directory, result
    return found


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", "–" if value is None else text

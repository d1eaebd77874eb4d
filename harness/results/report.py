"""The table of results, and the same as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.errors import HarnessError
from harness.results.result import RESULT, RunResult, read_result

_MIN_WIDTH = 110
_VERDICTS = {True: "VALID", False: "INVALID", None: "–"}

Runs = Sequence[tuple[Path, RunResult]]
"""Folders of runs, and their results."""


def find_results(directories: Sequence[Path]) -> Runs:
    """Results of complete runs in or below these folders, by path.

    Raises
    ------
    HarnessError
        When a folder holds none, or one that cannot be read.
    """
    found: dict[Path, RunResult] = {}
    for directory in directories:
        paths = [
            path
            for path in ([directory] if directory.is_file() else sorted(directory.rglob(RESULT)))
            if not path.parent.name.endswith(".partial")
        ]
        if not paths:
            raise HarnessError(f"{directory}: no {RESULT} of a complete run in or below it")
        found |= {path.parent: read_result(path) for path in paths}
    return list(found.items())


def print_table(runs: Runs) -> None:
    """Print one table of all runs to stdout, and below it where their files are."""
    console = Console(soft_wrap=True, markup=False)  # paths and LoadGen's words may hold [ ]
    console.width = max(console.width, _MIN_WIDTH)  # better wrapped by the terminal than cut off
    table = Table(title="ssd-resnet34")
    for name in ("scenario", "mode", "LoadGen"):
        table.add_column(name, no_wrap=True)
    for name in ("mAP", "AP50", "samples/s", "p50 ms", "p90 ms", "p99 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, result in runs:
        table.add_row(*_row(result))
    console.print(table)
    if any(_is_batch_latency(result) for _, result in runs):
        console.print("Offline and accuracy runs: latency of one batch in the engine.")
    for directory, result in runs:
        console.print(f"{result.scenario} {result.mode}: logs in {directory}", highlight=False)
        if result.pictures:
            console.print(f"  pictures in {directory / result.pictures}", highlight=False)
        for message in (*result.errors, *result.warnings):
            console.print(f"  {message}", highlight=False)


def to_json(runs: Runs) -> str:
    """Results as a JSON list, each with its ``directory``."""
    documents = [
        {"directory": str(directory), **dataclasses.asdict(result)} for directory, result in runs
    ]
    return json.dumps(documents, indent=2)


def _row(result: RunResult) -> list[str]:
    accuracy = result.accuracy or {}
    latency = result.batch_latency_ms if _is_batch_latency(result) else result.latency_ms
    return [
        result.scenario,
        result.mode,
        _VERDICTS[result.valid],
        _number(accuracy.get("mAP"), 4),
        _number(accuracy.get("AP50"), 4),
        _number(result.samples_per_second, 2),
        *(_number(latency.get(name), 2) for name in ("p50", "p90", "p99")),
    ]


def _is_batch_latency(result: RunResult) -> bool:
    """Offline is one query, whose latency is the whole run's."""
    return result.scenario == "Offline" or not result.latency_ms


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"

"""The table of results, and the same as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from graph_surgery.terminal import new_console
from harness.errors import HarnessError
from harness.results.result import RESULT, RunResult, read_result

INDEX = "index.html"
"""The list of all runs, in the folder that they lie in."""

OURS = '<meta name="generator" content="ssd-resnet34-trt">'
"""In the head of every page that the project writes: files without it are the user's."""

_COLUMNS = (
    ("run", "date", "data set"),
    ("model", "engine", "device"),
    ("scenario", "mode", "LoadGen"),
    ("mAP", "AP50", "samples/s"),
    ("p50 ms", "p90 ms", "p99 ms"),
)
"""Of the table on a terminal, which has 80 columns: what stands below each other."""

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
        if len(directories) > 1 and is_page(directory):
            continue  # build/logs/* has the list of runs, too
        paths = [
            path
            for path in ([directory] if directory.is_file() else sorted(directory.rglob(RESULT)))
            if not path.parent.name.endswith(".partial")
        ]
        if not paths:
            raise HarnessError(f"{directory}: no {RESULT} of a complete run in or below it")
        found |= {path.parent: read_result(path) for path in paths}
    return list(found.items())


def is_page(path: Path) -> bool:
    """Whether a file is a page that the project wrote."""
    try:
        with path.open("rb") as file:
            return OURS.encode() in file.read(1024)
    except OSError:
        return False


def facts_of(directory: Path, result: RunResult) -> dict[str, str | float | None]:
    """What a table has of a run: what identifies it, and its figures; None for what it has not."""
    engine, accuracy = result.engine, result.accuracy or {}
    taken = engine.get("input")
    device = _device(engine)
    latency = result.batch_latency_ms if is_batch_latency(result) else result.latency_ms
    return {
        "run": root_of(directory, result).name,
        "date": result.finished[:16].replace("T", " "),
        "scenario": result.scenario,
        "mode": result.mode,
        "LoadGen": _verdict(result),
        "mAP": accuracy.get("mAP"),
        "AP50": accuracy.get("AP50"),
        "samples/s": result.samples_per_second,
        **{f"{name} ms": latency.get(name) for name in ("p50", "p90", "p99")},
        "model": str(engine.get("model")),
        "input": str(taken.get("dtype")) if isinstance(taken, Mapping) else None,
        "engine": str(engine.get("backend")),
        "device": result.versions.get("cpu", device) if device == "cpu" else device,
        "data set": str(result.dataset.get("name")),
        "samples": result.dataset.get("samples"),
    }


def _devices(engine: Mapping[str, Any]) -> list[object]:
    found = engine.get("devices")
    return found if isinstance(found, list) else [found]


def _device(engine: Mapping[str, Any]) -> str:
    devices, gpu = _devices(engine), engine.get("gpu")
    if gpu:
        return f"{len(devices)} x {gpu}" if len(devices) > 1 else str(gpu)
    return ", ".join(map(str, devices))


def _verdict(result: RunResult) -> str | None:
    """LoadGen's, unless devices were lost: then the figure is of fewer than the run is of."""
    word = {True: "VALID", False: "INVALID", None: None}[result.valid]
    if not result.lost_devices:
        return word
    count, lost = len(_devices(result.engine)), len(result.lost_devices)
    return ", ".join(filter(None, [word, f"{lost} of {count} lost"]))


def as_text(name: str, value: str | float | None) -> str:
    """Value of one of `facts_of` for people."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{4 if name in ('mAP', 'AP50') else 2}f}"
    return str(value)


def root_of(directory: Path, result: RunResult) -> Path:
    """Folder of all tests of a run, of which one lies in ``SYSTEM/BENCHMARK/SCENARIO/MODE``."""
    path = directory.resolve()
    inside = path.parent.name == result.scenario and len(path.parents) > 3
    return path.parents[3] if inside else path


def print_table(runs: Runs) -> None:
    """Print one table of all runs to stdout, and below it where their files are."""
    console = new_console(soft_wrap=True, markup=False)  # paths and LoadGen's words may hold [ ]
    title = ", ".join(dict.fromkeys(result.benchmark for _, result in runs))
    table = Table(title=Text(title), show_lines=True)
    for number, heads in enumerate(_COLUMNS):
        table.add_column(
            "\n".join(heads),
            justify="right" if number > 2 else "left",
            overflow="fold",
            no_wrap=number > 1,
        )
    for directory, result in runs:
        facts = facts_of(directory, result)
        cells = ("\n".join(as_text(name, facts[name]) for name in heads) for heads in _COLUMNS)
        table.add_row(*map(Text, cells))
    console.print(table, soft_wrap=False)
    if any(is_batch_latency(result) for _, result in runs):
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


def to_csv(runs: Runs) -> str:
    """The table as CSV, a line for each run; what a run has not is empty."""
    rows = [{**facts_of(*run), "directory": str(run[0])} for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def is_batch_latency(result: RunResult) -> bool:
    """Offline is one query, whose latency is the whole run's."""
    return result.scenario == "Offline" or not result.latency_ms

"""All tests of a run, one after the other, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import chain, count
from pathlib import Path

import typer

from engine.support.progress import progress_bar
from harness.command import leave
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.settings import Mode, Settings
from harness.results.report import print_table
from harness.results.result import RunResult
from harness.results.run import Benchmark, run

Test = tuple[Benchmark, Settings, Mode, Path]
"""What to run, and the folder for its logs."""


def new_log_dir(build_dir: Path) -> Path:
    """Make a folder for the logs of a run, which no other run has: ``logs/<time>``.

    Raises
    ------
    HarnessError
        When it cannot be made.
    """
    stem = datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in chain([stem], (f"{stem}-{number}" for number in count(2))):
        folder = build_dir / "logs" / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # of a run that began in the same second
            continue
        except OSError as error:
            raise HarnessError(f"{folder}: cannot make it: {error.strerror}") from error
        return folder
    raise AssertionError  # the numbers do not end


def run_all(tests: Sequence[Test]) -> None:
    """Run tests and print the table of their results.

    After a test that fails the process ends.

    Raises
    ------
    HarnessError
        See `harness.results.run.run`.
    """
    results: list[tuple[Path, RunResult]] = []
    evaluated = (one.warnings for one, _, mode, _ in tests if mode == "AccuracyOnly")
    for warning in dict.fromkeys(chain.from_iterable(evaluated)):
        typer.echo(f"warning: {warning}", err=True)
    try:
        for benchmark, settings, mode, where in tests:
            typer.echo(_announcement(settings, mode, len(benchmark.source.files)), err=True)
            with progress_bar(f"{settings.scenario} {mode}") as progress:
                results.append((where, run(benchmark, settings, mode, where, progress)))
    except RunFailedError as error:
        if results:
            print_table(results)
        leave(error)
    print_table(results)


def _announcement(settings: Settings, mode: Mode, samples: int) -> str:
    """Say what is about to run: a run of the benchmark's length is silent for long."""
    if mode == "AccuracyOnly":
        return f"{settings.scenario} {mode}: {samples} samples"
    least = [f"{settings.min_duration_ms / 1000:g} s"]
    if settings.min_query_count:
        what = "samples" if settings.scenario == "Offline" else "queries"
        least.append(f"{settings.min_query_count} {what}")
    return f"{settings.scenario} {mode}: at least {' and '.join(least)}"

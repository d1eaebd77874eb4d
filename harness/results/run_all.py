"""All tests of a run, one after the other, and their table."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain, count
from pathlib import Path

import typer

from engine.support.files import write_atomically
from engine.support.progress import progress_bar
from harness.command import leave
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.settings import Mode, Settings
from harness.results.accuracy import Evaluation
from harness.results.page import PAGE, render_page, write_index
from harness.results.report import Runs, find_results, print_table, root_of
from harness.results.result import RunResult
from harness.results.review import Review, review
from harness.results.run import Benchmark, run

Test = tuple[Benchmark, Settings, Mode, Path]
"""What to run, and the folder for its logs."""


def new_folder(parent: Path) -> Path:
    """Make a folder named by the time, which is no other run's.

    Raises
    ------
    HarnessError
        When it cannot be made.
    """
    stem = datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in chain([stem], (f"{stem}-{number}" for number in count(2))):
        folder = parent / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # of a run that began in the same second
            continue
        except OSError as error:
            raise HarnessError(f"{folder}: cannot make it: {error.strerror}") from error
        return folder
    raise AssertionError  # the numbers do not end


def run_all(tests: Sequence[Test], build_dir: Path) -> None:
    """Run tests, print the table of their results, and write their page.

    After a test that fails the process ends.

    Parameters
    ----------
    tests
        Their folders lie in one, as ``SYSTEM/BENCHMARK/SCENARIO/MODE``, where the page goes.
    build_dir
        The build folder; a list of all runs in its ``logs`` goes there.

    Raises
    ------
    HarnessError
        See `harness.results.run.run`.
    """
    results: list[tuple[Path, RunResult]] = []
    reviews: dict[Path, Review] = {}
    evaluated = (one.warnings for one, _, mode, _ in tests if mode == "AccuracyOnly")
    for warning in dict.fromkeys(chain.from_iterable(evaluated)):
        typer.echo(f"warning: {warning}", err=True)
    try:
        for benchmark, settings, mode, where in tests:
            typer.echo(_announcement(settings, mode, len(benchmark.source.files)), err=True)
            with progress_bar(f"{settings.scenario} {mode}") as progress:
                result = run(
                    benchmark,
                    settings,
                    mode,
                    where,
                    progress,
                    evaluated=functools.partial(_keep_review, reviews, where),
                )
                results.append((where, result))
    except RunFailedError as error:
        if results:
            print_table(results)
        leave(error)
    _report(results, reviews, build_dir)


def _keep_review(reviews: dict[Path, Review], where: Path, found: Evaluation) -> None:
    reviews[where.resolve()] = review(found)


def _report(results: Runs, reviews: Mapping[Path, Review], build_dir: Path) -> None:
    print_table(results)
    root = root_of(*results[0])
    page, logs = root / PAGE, build_dir / "logs"
    try:
        html = render_page(find_results([root]), build_dir, reviews)
        write_atomically(page, html.encode())
        if root.parent == logs.resolve():
            write_index(logs)
    except Exception as error:  # the run is done, whatever becomes of its page
        reason = " ".join(str(error).split())
        typer.echo(
            f"harness: no page was written: {type(error).__name__}: {reason}; for another try: "
            f"harness report {root} -o report.html",
            err=True,
        )
    else:
        typer.echo(f"page in {os.path.relpath(page)}")


def _announcement(settings: Settings, mode: Mode, samples: int) -> str:
    """Say what is about to run: a run of the benchmark's length is silent for long."""
    if mode == "AccuracyOnly":
        return f"{settings.scenario} {mode}: {samples} samples"
    least = [f"{settings.min_duration_ms / 1000:g} s"]
    if settings.min_query_count:
        what = "samples" if settings.scenario == "Offline" else "queries"
        least.append(f"{settings.min_query_count} {what}")
    return f"{settings.scenario} {mode}: at least {' and '.join(least)}"

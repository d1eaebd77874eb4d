"""All tests of a run, one after the other, and their table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain, count
from pathlib import Path

import typer

from engine.errors import EngineError
from engine.support.files import write_atomically
from engine.support.progress import progress_bar
from harness.command import leave
from harness.data.dataset import load_map
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.settings import Mode, Settings
from harness.results.accuracy import Evaluation
from harness.results.layers import check_layers, measure_layers
from harness.results.page import PAGE, render_page, write_index
from harness.results.report import Runs, find_results, is_page, print_table, root_of
from harness.results.result import RESULT, RunResult, engine_difference, read_result
from harness.results.review import Review, review
from harness.results.run import SAMPLES, Benchmark, run

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


def check_folders(folders: Sequence[Path]) -> None:
    """Refuse folders of tests that exist, before anything is loaded or run.

    Raises
    ------
    HarnessError
        Names the first.
    """
    for folder in folders:
        if folder.exists():
            raise HarnessError(
                f"{folder} exists; choose another log directory, remove it, or pass --resume to "
                "run only what is missing"
            )


def run_all(
    tests: Sequence[Test], build_dir: Path, *, resume: bool = False, layers: bool = False
) -> None:
    """Run tests, print the table of their results, and write their page.

    After a test that fails the process ends.

    Parameters
    ----------
    tests
        Their folders lie in one, as ``SYSTEM/BENCHMARK/SCENARIO/MODE``, where the page goes.
    build_dir
        The build folder; a list of all runs in its ``logs`` goes there.
    resume
        Take the results of tests that were run, and run the others.
    layers
        Time the layers of the engine after each performance run.

    Raises
    ------
    HarnessError
        See `harness.results.run.run`; when what was run is another test than this one.
    """
    there = _results_of(tests) if resume else {}
    if layers:
        for benchmark in {id(one): one for one, *_ in tests}.values():
            check_layers(benchmark.engines[0])
    results: list[tuple[Path, RunResult]] = []
    reviews: dict[Path, Review] = {}
    evaluated = (one.warnings for one, _, mode, _ in tests if mode == "AccuracyOnly")
    for warning in dict.fromkeys(chain.from_iterable(evaluated)):
        typer.echo(f"warning: {warning}", err=True)
    try:
        for benchmark, settings, mode, where in tests:
            if where in there:
                typer.echo(f"{settings.scenario} {mode}: was run, {where}", err=True)
                results.append((where, there[where]))
                continue
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
            if layers and mode == "PerformanceOnly":
                _time_layers(
                    benchmark, int(result.settings.get("batch_size") or settings.batch), where
                )
    except RunFailedError as error:
        if results:
            print_table(results)
        leave(error)
    _report(results, reviews, build_dir)


def _keep_review(reviews: dict[Path, Review], where: Path, found: Evaluation) -> None:
    with contextlib.suppress(Exception):  # the run counts; its page may find out for itself
        reviews[where.resolve()] = review(found)


def _results_of(tests: Sequence[Test]) -> dict[Path, RunResult]:
    """Results of the tests that were run already, each the same test of the same engine."""
    found = {}
    for benchmark, settings, mode, where in tests:
        if not where.exists():
            continue
        result = read_result(where / RESULT)
        data = benchmark.dataset.name if benchmark.dataset else None
        asked = json.loads(json.dumps(dataclasses.asdict(settings)))
        # an accuracy run takes every sample once, however long a performance run is to be
        of_mode = asked if mode == "PerformanceOnly" else {"batch_size", "streams"}
        model = {"model": result.engine.get("model")}  # which may have another path
        if (different := engine_difference(result.engine, {**benchmark.manifest, **model})) is None:
            for name, was, now in (
                ("scenario", result.scenario, settings.scenario),
                ("mode", result.mode, mode),
                ("data set", result.dataset.get("name"), data),
                *((key, result.asked.get(key), asked[key]) for key in asked if key in of_mode),
            ):
                if was != now:
                    different = f"{name} was {was!r} and is {now!r} now"
            if load_map(where / SAMPLES) != tuple(benchmark.source.files):
                different = f"its samples, see {SAMPLES}, are others now"
        if different is not None:
            raise HarnessError(f"--resume: {where} is of another test: {different}")
        found[where] = result
    return found


def _time_layers(benchmark: Benchmark, batch: int, where: Path) -> None:
    try:
        measure_layers(benchmark.engines[0], batch).write(where)
    except (EngineError, HarnessError, OSError) as error:  # the run is done
        typer.echo(f"warning: {error}", err=True)


def _report(results: Runs, reviews: Mapping[Path, Review], build_dir: Path) -> None:
    print_table(results)
    root = root_of(*results[0])
    page, logs = root / PAGE, build_dir / "logs"
    homes = list(dict.fromkeys(where.resolve().parents[1] for where, _ in results))
    try:
        if page.exists() and not is_page(page):
            raise HarnessError(f"{os.path.relpath(page)} is none of ours")
        html = render_page(find_results(homes), build_dir, reviews)
        write_atomically(page, html.encode())
        if root.parent == logs.resolve():
            write_index(logs)
    except Exception as error:  # the run is done, whatever becomes of its page
        reason = " ".join(str(error).split())
        typer.echo(
            f"harness: no page was written: {type(error).__name__}: {reason}; for another try: "
            f"harness report {root} -o FILE.html",
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

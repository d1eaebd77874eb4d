"""Commands ``compliance`` and ``submission``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.support.documents import checked
from engine.support.progress import progress_bar
from harness.cli.options import Backend, BuildDir, Device, Devices, Preprocessed, Threads, Url
from harness.command import leave
from harness.data.dataset import known_dataset, preprocessed_dir
from harness.errors import HarnessError, RunFailedError, as_harness_error
from harness.loadgen.audit import COMPLIANCE_TESTS
from harness.results.devices import load_engines, parse_devices, parse_urls

if TYPE_CHECKING:
    from engine.protocol import Engine
    from harness.submission.compliance import Verdict


def compliance(
    test: Annotated[str, typer.Argument(help=f"One of: {', '.join(COMPLIANCE_TESTS)}.")],
    model: Annotated[Path, typer.Argument(help="Model file of the base runs.", show_default=False)],
    *,
    base: Annotated[
        Path,
        typer.Option(
            help="Log folder of 'harness run', with the base runs.",
            show_default=False,
            metavar="LOG_DIR",
        ),
    ],
    engine: Backend = "onnxruntime",
    preprocessed: Preprocessed = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="TEST04: samples in memory together; more make TEST04-A longer.",
            show_default="as in the base run",
        ),
    ] = None,
    device: Device = None,
    devices: Devices = None,
    url: Url = None,
    threads: Threads = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Run a compliance test of MLPerf Inference v2.0 on every scenario that LOG_DIR holds.

    The settings are those of the base performance run. Logs and verdict files lie beside it. The
    exit code is 1 when the test fails.
    """
    name = test.upper()
    if name not in COMPLIANCE_TESTS:
        raise HarnessError(f"unknown test {test!r}; choose of: {', '.join(COMPLIANCE_TESTS)}")
    from harness.benchmarks import benchmark_of
    from harness.data.preprocess import open_current
    from harness.results.run import Benchmark
    from harness.submission.compliance import check_compliance, find_bases

    bases = find_bases([base])
    numbers = None if devices is None else parse_devices(devices)
    urls = None if url is None else parse_urls(url)

    @functools.cache
    def engines_up_to(max_batch: int | None) -> tuple[Engine, ...]:
        return load_engines(
            engine,
            model,
            device=device,
            devices=numbers,
            threads=threads,
            urls=urls,
            max_batch=max_batch,
        )

    failed = False
    try:
        for one in bases:
            _, result = one.run("PerformanceOnly")
            described = benchmark_of(result.benchmark)
            if name not in described.compliance:
                raise HarnessError(
                    f"{one.directory}: round {described.round} has no {name} for "
                    f"{described.detector}, but {', '.join(described.compliance)}"
                )
            with as_harness_error():
                limit = checked(
                    int | None,  # type: ignore[arg-type]
                    result.engine.get("max_batch"),
                    f"{one.directory}: max_batch of its engine: ",
                )
            engines = engines_up_to(limit)  # as prepared for the base run
            spec = engines[0].input_spec
            dataset, _, split = str(result.dataset["name"]).rpartition("-")
            data = known_dataset(dataset, split, build_dir)
            directory = preprocessed or preprocessed_dir(build_dir, data, spec)
            source = open_current(data, spec, directory)
            timeout = float(result.settings["timeout_s"])
            with progress_bar(f"{one.scenario} {name}") as progress:
                verdict = check_compliance(
                    Benchmark(engines, source, data, timeout, detector=result.benchmark),
                    one,
                    name,
                    samples=samples,
                    progress=progress,
                )
            failed |= not verdict.passed
            _print(verdict)
    except RunFailedError as error:
        leave(error)
    if failed:
        raise typer.Exit(1)


def _print(verdict: Verdict) -> None:
    typer.echo(f"{verdict.scenario} {verdict.test}: {'PASS' if verdict.passed else 'FAIL'}")
    for key, value in verdict.figures.items():
        typer.echo(f"  {key}: {value:.6g}")
    for path in verdict.files:
        typer.echo(f"  {path}")
    for remark in verdict.remarks:
        typer.echo(f"  remark: {remark}")


def submission(
    logs: Annotated[
        list[Path] | None,
        typer.Argument(help="Log folders of 'harness run' and 'harness compliance'."),
    ] = None,
    *,
    submitter: Annotated[str | None, typer.Option(help="Organisation that submits.")] = None,
    division: Annotated[str, typer.Option(help="open or closed.")] = "open",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the submission tree.")
    ] = None,
    system: Annotated[
        Path | None,
        typer.Option(help="TOML file with what cannot be read from the runs; see docs/mlperf.md."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Check the submission tree in this folder instead.")
    ] = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Write a submission tree in the layout of MLPerf Inference v2.0, or check one.

    The accuracy logs are evaluated for it again, which takes the annotations of their data set.
    The exit code of a check is 1 when it finds an error; warnings do not count.
    """
    if check is not None:
        if logs or submitter or output or system:
            raise HarnessError("--check takes a submission tree and nothing else")
        _check(check)
        return
    if not logs or not submitter or not output:
        raise HarnessError("give --submitter, -o and the log folders, or --check")
    from harness.submission.compliance import find_bases
    from harness.submission.description import load_description
    from harness.submission.tree import write_submission

    tree, notes = write_submission(
        find_bases(logs),
        submitter=submitter,
        division=division,
        description=load_description(system),
        annotations=functools.partial(_annotations, build_dir),
        output=output,
    )
    typer.echo(tree)
    for note in notes:
        typer.echo(f"  {note}")


def _annotations(build_dir: Path, name: str) -> Path:
    """Annotations of a data set's split, ``<data set>-<split>``."""
    dataset, _, split = name.rpartition("-")
    annotations = known_dataset(dataset, split, build_dir).annotations
    if annotations is None:
        raise HarnessError(f"{name} has no annotations, and its runs no mAP")
    return annotations


def _check(tree: Path) -> None:
    from harness.submission.check import check_submission

    findings = check_submission(tree)
    for finding in findings:
        typer.echo(str(finding))
    errors = sum(finding.error for finding in findings)
    typer.echo(f"{errors} errors, {len(findings) - errors} warnings in {tree}")
    if errors:
        raise typer.Exit(1)

"""The ``harness`` command. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.dataset import dataset_app
from harness.cli.doctor import doctor
from harness.cli.download import download_app
from harness.cli.make import register as register_route
from harness.cli.options import (
    BuildDir,
    DatasetName,
    Device,
    Devices,
    Preprocessed,
    RunBackend,
    Scenarios,
    TestModes,
    Threads,
    Url,
)
from harness.cli.predict import predict
from harness.cli.preprocess import preprocess
from harness.cli.submission import compliance, submission
from harness.cli.triton import triton_repository
from harness.command import run_command
from harness.data.dataset import known_dataset, load_map, preprocessed_dir
from harness.errors import HarnessError
from harness.loadgen.settings import MODEL, MODES, SCENARIOS, largest_batch, load_settings
from harness.make.arguments import choices
from harness.results.devices import AUTO, fastest, load_engines, parse_devices, parse_urls

if TYPE_CHECKING:
    from harness.results.report import Runs

app = typer.Typer(
    help="Preprocess data, run MLPerf LoadGen on an engine, evaluate and report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(download_app, name="download")
app.add_typer(dataset_app, name="dataset")
app.command()(preprocess)
app.command()(predict)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Model file, e.g. an .onnx.", show_default=False)],
    *,
    engine: RunBackend = "onnxruntime",
    dataset: DatasetName = "coco",
    split: Annotated[str, typer.Option(help="val or cal (calibration).")] = "val",
    preprocessed: Preprocessed = None,
    scenarios: Scenarios = "Offline",
    test_mode: TestModes = "PerformanceOnly",
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; see harness/loadgen/settings.py.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Batch size (Offline, Server).", show_default="what a plan was built for, else 8"
        ),
    ] = None,
    target_qps: Annotated[
        float | None,
        typer.Option(help="Samples per second (Offline, Server).", show_default="from a warm-up"),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds: the bound in Server, the expectation in Single- and MultiStream.",
            show_default="100 in Server, else from a warm-up",
        ),
    ] = None,
    min_duration: Annotated[
        float | None,
        typer.Option(help="Seconds of a performance run at least.", show_default="600"),
    ] = None,
    min_queries: Annotated[
        int | None,
        typer.Option(
            help="Queries of a performance run at least; in Offline, samples.",
            show_default="24576 in Offline, else LoadGen's",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples in memory together.", show_default="64")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that one batch may take before the run ends.")
    ] = 300.0,
    device: Device = None,
    devices: Devices = None,
    url: Url = None,
    streams: Annotated[
        int | None,
        typer.Option(help="Sessions side by side on each device.", show_default="1"),
    ] = None,
    threads: Threads = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Draw the detections of an accuracy run on N images.")
    ] = 0,
    system: Annotated[
        str | None, typer.Option(help="Name of the machine.", show_default="host name")
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the logs.", show_default="logs/<time> in the build folder"),
    ] = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Run LoadGen on MODEL: every scenario in every test mode.

    Each test leaves LoadGen's logs, its user.conf and a result.json in
    LOG_DIR/SYSTEM/ssd-resnet34/SCENARIO/MODE. An INVALID result is a result (exit code 0); a run
    that fails has exit code 1.

    With --engine auto, what can run the .onnx file here is measured for a second each at the
    largest batch of the run, plans of it that are beside it or in engines of the build folder
    among them, and the fastest is taken. The build folder remembers.
    """
    chosen = choices(scenarios, tuple(SCENARIOS), "scenario")
    modes = choices(test_mode, MODES, "test mode")
    settings = load_settings(
        chosen,
        config,
        {
            "batch_size": batch,
            "target_qps": target_qps,
            "target_latency_ms": _whole(target_latency),
            "min_duration_ms": None if min_duration is None else round(min_duration * 1000),
            "min_query_count": min_queries,
            "performance_sample_count": samples,
            "streams": streams,
        },
    )
    from harness.data.oddities import oddities
    from harness.data.preprocess import open_current
    from harness.results.run import Benchmark
    from harness.results.run_all import new_folder, run_all

    numbers = None if devices is None else parse_devices(devices)
    urls = None if url is None else parse_urls(url)
    if engine == AUTO:
        if urls is not None:
            raise HarnessError("--url names Triton servers, which --engine auto does not measure")
        if numbers and device not in {None, "cuda"}:
            raise HarnessError(f"--devices chooses GPUs, but the device is {device}")
        first = f"cuda:{numbers[0]}" if numbers else device
        way = fastest(model, first, threads, largest_batch(settings), build_dir)
        engine, model = way.backend, Path(way.file)
        device = None if numbers else way.device
    engines = load_engines(
        engine,
        model,
        device=device,
        devices=numbers,
        threads=threads,
        urls=urls,
        max_batch=largest_batch(settings),
    )
    spec = engines[0].input_spec
    data = known_dataset(dataset, split, build_dir)
    directory = preprocessed or preprocessed_dir(build_dir, data, spec)
    source = open_current(data, spec, directory)
    warnings = oddities(data, source, model) if "AccuracyOnly" in modes else ()
    benchmark = Benchmark(engines, source, data, timeout, pictures, warnings)
    root = log_dir or new_folder(build_dir / "logs")
    home = root / (system or platform.node()) / MODEL
    run_all(
        [
            (benchmark, setting, mode, home / setting.scenario / mode)
            for mode in modes
            for setting in settings
        ],
        build_dir,
    )


@app.command()
def accuracy(
    log: Annotated[Path, typer.Argument(help="mlperf_log_accuracy.json of any run.")],
    dataset: Annotated[
        str | None, typer.Option(help="Its annotations and its map: coco, demo or another.")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO annotations instead; the sample order is that of its images."),
    ] = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Compute the COCO mAP of an accuracy log as MLPerf's accuracy-coco.py does.

    In the folder of a run of this harness, samples.txt says which image each sample is; elsewhere
    the data set's map or the order of the annotations does.
    """
    from harness.results.accuracy import evaluate
    from harness.results.run import SAMPLES

    if (dataset is None) == (annotations is None):
        raise HarnessError("give either --dataset or --annotations")
    files = None
    if dataset is not None:
        data = known_dataset(dataset, "val", build_dir)
        annotations, files = data.annotations, load_map(data.map_file)
    if annotations is None:
        raise HarnessError(f"{dataset} has no annotations")
    if (log.parent / SAMPLES).exists():
        files = load_map(log.parent / SAMPLES)
    result = evaluate(log, annotations, files)
    for name, value in result.stats.items():
        typer.echo(f"{name:>6} {value:.4f}")
    typer.echo(f"{result.images_seen} of {result.images_total} images, ", nl=False)
    typer.echo(f"{result.detections} detections")
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"mAP={100 * result.mAP:.3f}%")  # the line that MLPerf's tools look for


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Folders of or above runs.")],
    *,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of a table.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write a page instead: HTML with charts and images, the runs side by side.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output where it is another file.")
    ] = False,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Print the results of runs again, or write them as a page."""
    from harness.results.report import find_results, print_table, to_csv, to_json

    results: Runs = find_results(directories)
    if output is not None:
        from engine.support.files import check_output, write_output
        from harness.results.page import render_page

        check_output(output, [])
        write_output(output, render_page(results, build_dir).encode(), overwrite=force)
        typer.echo(f"page in {output}")
    elif json or csv:
        typer.echo(to_json(results) if json else to_csv(results))
    else:
        print_table(results)


app.command()(compliance)
app.command()(submission)
app.command("triton-repository")(triton_repository)
register_route(app)
app.command()(doctor)


def main() -> None:
    """Run the command; a user error is one line and exit code 2."""
    run_command(app)


def _whole(value: float | None) -> float | int | None:
    """Server's bound is a whole number of milliseconds, the other latencies need not be."""
    return int(value) if value is not None and value.is_integer() else value

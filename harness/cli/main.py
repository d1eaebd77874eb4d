"""The ``harness`` command. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.load import BACKENDS
from harness.benchmarks import benchmark_of_file
from harness.cli.dataset import dataset_app
from harness.cli.doctor import doctor
from harness.cli.download import download_app
from harness.cli.make import register as register_route
from harness.cli.options import (
    DATA,
    LOADGEN,
    MACHINE,
    RESULTS,
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
from harness.cli.report import accuracy, report
from harness.cli.submission import compliance, submission
from harness.cli.triton import triton_repository
from harness.command import run_command
from harness.data.dataset import known_dataset, preprocessed_dir
from harness.errors import HarnessError
from harness.loadgen.settings import (
    MODES,
    SCENARIOS,
    largest_batch,
    load_settings,
    settings_from,
)
from harness.make.arguments import choices
from harness.make.system_config import config_of, host_name
from harness.results.devices import AUTO, fastest, load_engines, parse_devices, parse_urls

app = typer.Typer(
    help="Preprocess data, run MLPerf LoadGen on an engine, evaluate and report.",
    no_args_is_help=True,
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
    scenarios: Scenarios = "Offline",
    test_mode: TestModes = "PerformanceOnly",
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of settings, or what 'harness tune -o' writes; docs/toml.md has its "
            "keys. Options go before it.",
            show_default=False,
        ),
    ] = None,
    dataset: DatasetName = None,
    split: Annotated[
        str, typer.Option(help="val or cal (calibration).", rich_help_panel=DATA)
    ] = "val",
    preprocessed: Preprocessed = None,
    engine: RunBackend = None,
    device: Device = None,
    devices: Devices = None,
    url: Url = None,
    streams: Annotated[
        int | None,
        typer.Option(
            help="Sessions side by side on each device.",
            show_default="1",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    threads: Threads = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds that one batch may take before the run ends.",
            rich_help_panel=MACHINE,
        ),
    ] = 300.0,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Batch size (Offline, Server).",
            show_default="what a plan was built for, else 8",
            rich_help_panel=LOADGEN,
        ),
    ] = None,
    target_qps: Annotated[
        float | None,
        typer.Option(
            help="Samples per second (Offline, Server).",
            show_default="from a warm-up",
            rich_help_panel=LOADGEN,
        ),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds: the bound in Server, the expectation in Single- and MultiStream.",
            show_default="100 in Server, else from a warm-up",
            rich_help_panel=LOADGEN,
        ),
    ] = None,
    min_duration: Annotated[
        float | None,
        typer.Option(
            help="Seconds of a performance run at least.",
            show_default="600",
            rich_help_panel=LOADGEN,
        ),
    ] = None,
    min_queries: Annotated[
        int | None,
        typer.Option(
            help="Queries of a performance run at least; in Offline, samples.",
            show_default="24576 in Offline, else LoadGen's",
            rich_help_panel=LOADGEN,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Samples in memory together.", show_default="64", rich_help_panel=LOADGEN
        ),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            min=0,
            help="Draw the detections of an accuracy run on N images.",
            rich_help_panel=RESULTS,
        ),
    ] = 0,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Time the engine's layers on noise after each performance run, for its page.",
            rich_help_panel=RESULTS,
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            help="Name of the machine.",
            show_default="of the --config of 'harness tune', else the host's",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the logs.",
            show_default="logs/<time> in the build folder",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Run only the scenarios and modes that --log-dir lacks.",
            rich_help_panel=RESULTS,
        ),
    ] = False,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Run LoadGen on MODEL: every scenario in every test mode.

    Each test leaves LoadGen's logs, its user.conf and a result.json in
    LOG_DIR/SYSTEM/DETECTOR/SCENARIO/MODE. An INVALID result is a result (exit code 0); a run
    that fails has exit code 1. Folders that exist are refused before anything is loaded; with
    --resume their results are kept, if they are of the same test, and the others are run.

    With --engine auto, what can run the .onnx file here is measured for a second each at the
    largest batch of the run, plans of it that are beside it or in engines of the build folder
    among them, and the fastest is taken. The build folder remembers.
    """
    chosen = choices(scenarios, tuple(SCENARIOS), "scenario")
    modes = choices(test_mode, MODES, "test mode")
    if pictures and "AccuracyOnly" not in modes:
        raise HarnessError(
            "--pictures draws what an accuracy run detects: add --test_mode AccuracyOnly"
        )
    if resume and log_dir is None:
        raise HarnessError("--resume goes on in the folder of an earlier run: name it, --log-dir")
    described = benchmark_of_file(model)
    machine = None if config is None else config_of(config, described.detector)
    overrides = {
        "batch_size": batch,
        "target_qps": target_qps,
        "target_latency_ms": _whole(target_latency),
        "min_duration_ms": None if min_duration is None else round(min_duration * 1000),
        "min_query_count": min_queries,
        "performance_sample_count": samples,
        "streams": streams,
    }
    if machine is None:
        settings = load_settings(chosen, config, overrides)
    else:
        settings = settings_from(machine.tables, chosen, overrides)
    from harness.data.oddities import check_classes, oddities
    from harness.data.preprocess import open_current
    from harness.results.run import Benchmark
    from harness.results.run_all import check_folders, new_folder, run_all

    numbers = None if devices is None else parse_devices(devices)
    urls = None if url is None else parse_urls(url)
    if machine is not None and engine in {None, machine.engine}:
        engine, threads = machine.engine, threads or machine.threads
        urls = urls or (parse_urls(machine.url) if machine.url else None)
        if device is None and numbers is None and engine != "triton":
            numbers = machine.devices
            device = None if numbers else machine.device
    engine = engine or BACKENDS[0]
    system = system or (host_name() if machine is None else machine.name)
    place = (log_dir or Path()) / system / described.detector
    if log_dir is not None and not resume:
        check_folders([place / one.scenario / mode for mode in modes for one in settings])
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
    data = known_dataset(dataset or described.dataset, split, build_dir)
    directory = preprocessed or preprocessed_dir(build_dir, data, spec)
    source = open_current(data, spec, directory)
    check_classes(data, model)
    warnings = oddities(data, source, model) if "AccuracyOnly" in modes else ()
    benchmark = Benchmark(engines, source, data, timeout, pictures, warnings, described.detector)
    home = place if log_dir else new_folder(build_dir / "logs") / place
    run_all(
        [
            (benchmark, setting, mode, home / setting.scenario / mode)
            for mode in modes
            for setting in settings
        ],
        build_dir,
        resume=resume,
        layers=layers,
    )


app.command()(accuracy)
app.command()(report)
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

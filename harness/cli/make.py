"""The commands behind the make targets: ``harness make`` and ``harness tune``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from engine.load import BACKENDS
from harness.benchmarks import BENCHMARKS, DEFAULT
from harness.cli.options import DATA, MACHINE, Backend, BuildDir, Scenarios, TestModes
from harness.command import leave
from harness.errors import HarnessError, RunFailedError
from harness.make.system_config import VERSIONS

_Weights = Annotated[
    Path | None,
    typer.Option(
        envvar="WEIGHTS",
        help="Checkpoint, or its .onnx.",
        rich_help_panel=DATA,
        show_default="what download leaves in the build folder; the demo's",
    ),
]
_ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        envvar="IMAGE_SIZE",
        min=1,
        help="Side of the checkpoint's input image.",
        rich_help_panel=DATA,
        show_default="the checkpoint's own, else MLPerf's",
    ),
]
_Entry = Annotated[
    str | None,
    typer.Option(
        envvar="ENTRY",
        help="Entry of the checkpoint that holds the weights, as ema.",
        rich_help_panel=DATA,
        show_default="model, state_dict and others, in this order; said",
    ),
]
_Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="Another data set; see harness dataset add.",
        rich_help_panel=DATA,
        show_default="the benchmark's",
    ),
]


def make_command(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="One of: preprocess_data, calibrate, generate_engines, run_harness, run, onnx."
        ),
    ],
    *,
    benchmarks: Annotated[
        str, typer.Option(help=f"Comma-separated, of: {', '.join(BENCHMARKS)}.")
    ] = DEFAULT.name,
    scenarios: Scenarios = "Offline",
    test_mode: TestModes = "PerformanceOnly",
    config_ver: Annotated[
        str,
        typer.Option(
            "--config_ver", help=f"One of: {', '.join(VERSIONS)}.", rich_help_panel=MACHINE
        ),
    ] = VERSIONS[0],
    system: Annotated[
        str | None,
        typer.Option(
            help="Name of a file in configs/, or the path of any .toml of 'harness tune -o'.",
            show_default="this machine's",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Run for 60 s: a trial.")] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the GPUs to use together, as 0,1; or all.",
            show_default="of the system configuration",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of each Triton server, comma-separated.",
            show_default="of the system configuration, or one is started",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            help="Sessions side by side on each device.",
            show_default="of the system configuration",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    weights: _Weights = None,
    image_size: _ImageSize = None,
    entry: _Entry = None,
    dataset: _Dataset = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Do what the make target TARGET stands for, from the weights on.

    Each artefact is used again as long as everything that it was made from, and it itself, has the
    recorded SHA-256; else it is rebuilt, and a line says why. `run` is generate_engines and
    run_harness.
    """
    if context.args:
        known = [name for option in context.command.params for name in option.opts]
        raise HarnessError(
            f"unknown argument {context.args[0]!r}; the arguments are: "
            f"{', '.join(name for name in known if name.startswith('-'))}"
        )
    from harness.lock import locked
    from harness.make.arguments import choice, run_args
    from harness.make.route import route_of
    from harness.make.targets import TARGETS

    make = TARGETS[choice(target, tuple(TARGETS), "target")]
    arguments = run_args(
        benchmarks=benchmarks,
        scenarios=scenarios,
        test_mode=test_mode,
        config_ver=config_ver,
        system=system,
        fast=fast,
        devices=devices,
        url=url,
        streams=streams,
    )
    with locked(build_dir), _one_line():
        make(
            [
                route_of(
                    name,
                    weights,
                    build_dir,
                    typer.echo,
                    dataset=dataset,
                    image_size=image_size,
                    entry=entry,
                )
                for name in arguments.benchmarks
            ],
            arguments,
        )


def tune_command(
    *,
    benchmark: Annotated[
        str, typer.Option(help=f"One of: {', '.join(BENCHMARKS)}.")
    ] = DEFAULT.name,
    engine: Backend = BACKENDS[0],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    devices: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the GPUs to tune together, as 0,1; or all (--device cuda).",
            show_default="of the file that is written into, else the first",
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch to try.")] = 64,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Least length of a trial. Server's have 1,000 queries at least; a rate that needs "
            "over 120 s for them is not tried.",
        ),
    ] = 10.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="File to write into.", show_default="configs/<machine>.toml"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Put the figures into -o FILE where it exists.")
    ] = False,
    weights: _Weights = None,
    image_size: _ImageSize = None,
    entry: _Entry = None,
    dataset: _Dataset = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Measure the best settings of this machine, and put them into its system configuration.

    The rest of that file, such as other versions and scenarios, stays as it is. A file named by -o
    that exists is refused before the trials, but for --force: no two trials find the same figures.

    Offline: the batch, the threads (on a CPU) and the streams of the highest throughput. Server:
    the highest arrival rate that LoadGen calls VALID, by bisection.
    """
    from engine.backends.cuda import gpu_index
    from engine.support.files import check_output, write_output
    from harness.lock import locked
    from harness.make.arguments import choice
    from harness.make.route import route_of
    from harness.make.tune import Tuning, config_path, devices_of, put, read_config, tune
    from harness.results.devices import parse_devices

    benchmark = choice(benchmark, tuple(BENCHMARKS), "benchmark")
    engine = choice(engine, BACKENDS, "engine")
    if engine == "triton":
        raise HarnessError("tune measures this machine; name the engine that the server runs")
    if device != "cpu" and gpu_index(device) is None:
        raise HarnessError(f"unknown device {device!r}; choose of: cpu, cuda, cuda:N")
    if devices is not None and device != "cuda":
        raise HarnessError(f"--devices chooses GPUs, but the device is {device}")
    numbers = None if devices is None else parse_devices(devices)
    path = output or config_path(benchmark, device)
    check_output(path, [weights] if weights else [])
    with _one_line():
        before = read_config(path, benchmark, device)  # what is wrong with it shows now
    numbers = numbers or devices_of(before, device)
    tuning = Tuning(engine, device, max_batch, seconds, numbers)
    if output is not None and output.exists() and not force:
        raise HarnessError(f"{output}: exists already: name another, or pass --force to change it")
    with locked(build_dir), _one_line():
        try:
            route = route_of(
                benchmark,
                weights,
                build_dir,
                typer.echo,
                dataset=dataset,
                image_size=image_size,
                entry=entry,
            )
            found = tune(route, tuning)
        except RunFailedError as error:
            leave(error)
        document = read_config(path, benchmark, device)  # as it is now
    put(document, tuning, found)
    write_output(path, document.as_string().encode(), overwrite=True)
    typer.echo(f"wrote {path}")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    rest = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("make", context_settings=rest)(make_command)
    app.command("tune")(tune_command)


@contextmanager
def _one_line() -> Iterator[None]:
    """Make a user error of a file that cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise HarnessError(f"{error.filename}: {error.strerror}") from error

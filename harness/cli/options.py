"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.load import BACKENDS
from harness.benchmarks import DEFAULT
from harness.data.dataset import BENCHMARK_SETS
from harness.loadgen.settings import MODES, SCENARIOS

DATA, LOADGEN, MACHINE, RESULTS = "Data", "Settings of LoadGen", "Engine and machine", "Results"
"""Groups of options in the help."""

Backend = Annotated[
    str,
    typer.Option("--engine", help=f"One of: {', '.join(BACKENDS)}.", rich_help_panel=MACHINE),
]
BuildDir = Annotated[
    Path,
    typer.Option(
        envvar="BUILD_DIR", help="Folder of everything made at run time.", rich_help_panel=RESULTS
    ),
]
DatasetName = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help=f"{', '.join(BENCHMARK_SETS)} or one of harness dataset add.",
        show_default=f"that of the model's benchmark, as {DEFAULT.dataset}",
        rich_help_panel=DATA,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or cuda:N.",
        show_default="cpu with onnxruntime, else cuda",
        rich_help_panel=MACHINE,
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of each Triton server, comma-separated (engine triton).",
        show_default=False,
        rich_help_panel=MACHINE,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Numbers of the GPUs to use together, as 0,1; or all.",
        show_default="the first",
        rich_help_panel=MACHINE,
    ),
]
Preprocessed = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the preprocessed images.",
        show_default="in preprocessed_data of the build folder",
        rich_help_panel=DATA,
    ),
]
RunBackend = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help=f"One of: {', '.join(BACKENDS)}; or auto.",
        show_default=BACKENDS[0],
        rich_help_panel=MACHINE,
    ),
]
Scenarios = Annotated[
    str, typer.Option(help=f"Comma-separated, of: {', '.join(SCENARIOS)}; or all.")
]
TestModes = Annotated[
    str,
    typer.Option("--test_mode", help=f"Comma-separated, of: {', '.join(MODES)}; or all."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads.", show_default="one per CPU", rich_help_panel=MACHINE),
]

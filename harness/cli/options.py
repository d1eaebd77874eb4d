"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.load import BACKENDS
from harness.loadgen.settings import MODES, SCENARIOS

Backend = Annotated[str, typer.Option("--engine", help=f"One of: {', '.join(BACKENDS)}.")]
RunBackend = Annotated[
    str, typer.Option("--engine", help=f"One of: {', '.join(BACKENDS)}; or auto.")
]
BuildDir = Annotated[
    Path, typer.Option(envvar="BUILD_DIR", help="Folder of everything made at run time.")
]
DatasetName = Annotated[
    str, typer.Option("--dataset", help="coco, demo or one of harness dataset add.")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N.", show_default="cpu with onnxruntime, else cuda"),
]
Url = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of each Triton server, comma-separated (engine triton).",
        show_default=False,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Numbers of the GPUs to use together, as 0,1; or all.", show_default="the first"
    ),
]
Preprocessed = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the preprocessed images.",
        show_default="preprocessed_data/<dataset>-<split>/<dtype>_<size> in the build folder",
    ),
]
Scenarios = Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(SCENARIOS)}.")]
TestModes = Annotated[
    str, typer.Option("--test_mode", help=f"Comma-separated, of: {', '.join(MODES)}.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", show_default="one per CPU")
]

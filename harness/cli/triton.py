"""The command ``harness triton-repository``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import BuildDir


def triton_repository(
    model: Annotated[
        Path, typer.Argument(help="ONNX detector or built engine.", show_default=False)
    ],
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to make.", show_default=False)
    ],
    backend: Annotated[
        str,
        typer.Option(
            help="Triton's backend: tensorrt, onnxruntime, or python, which runs MODEL as "
            "'harness run' does."
        ),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            help="What runs an ONNX file in the backend python: onnxruntime (on the CPU) or cudnn.",
            show_default="onnxruntime",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Largest batch.", show_default="the engine's; 8 for ONNX"),
    ] = None,
    instances: Annotated[
        int, typer.Option(min=1, help="Instances on each GPU, or on the CPU.")
    ] = 1,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the GPUs to serve on, as 0,1; or all, those that the server finds.",
            show_default="all",
        ),
    ] = None,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="CUDA graphs in the backend tensorrt: measure whether they gain anything.",
        ),
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file that MODEL was built from, for the known answers where MODEL itself "
            "cannot run here.",
            show_default="MODEL itself",
        ),
    ] = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Write a model repository that Triton Inference Server serves MODEL from.

    It holds what MODEL finds on two dozen generated pictures. By these known answers every client
    checks the server, under load, before it runs anything on it.
    """
    from harness.errors import HarnessError
    from harness.results.devices import ALL, parse_devices
    from harness.triton.repository import write_repository
    from harness.triton.server import find_server

    repository = write_repository(
        model,
        output,
        backend,
        engine=engine,
        max_batch=max_batch,
        instances=instances,
        gpus=() if devices in {None, ALL} else parse_devices(str(devices)),
        graphs=graphs,
        reference=reference,
    )
    try:
        server = str(find_server(build_dir))
    except HarnessError:  # to be served elsewhere
        server = "tritonserver"
    typer.echo(f"wrote {repository.path}; serve it with:")
    typer.echo(shlex.join([server, *repository.server_arguments]))

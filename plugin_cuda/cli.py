"""``build-plugin``: build the CUDA kernels and the TensorRT plugin."""

from __future__ import annotations

import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from plugin_cuda.errors import PluginError

app = typer.Typer(pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"build-plugin {metadata.version('ssd-resnet34-trt')}")
        raise typer.Exit


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def build_plugin(
    *,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="80,90",
            help="Compute capabilities times ten, with commas between.",
            show_default="all that nvcc knows from 75 on, and PTX of the newest",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder.", show_default="plugins in the build folder"),
    ] = None,
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Build libnms_opt.so, libint8_layers.so and, where TensorRT's headers are found, the plugin.

    For architecture 90 there is libint8_conv.so besides, with convolutions of the cuDNN engine.

    The plugin is libnmsoptplugin.so, for programs that load it into TensorRT's registry;
    libnmsoptplugin_register.so does that for programs that only open a library.
    """
    from plugin_cuda.build import CONVOLUTIONS, KERNELS, PLUGIN, REGISTER, build, plan

    if output is None:
        output = Path(os.environ.get("BUILD_DIR") or "build") / "plugins"
    todo = plan(output, None if arch is None else _architectures(arch))
    typer.echo(f"nvcc {todo.nvcc.version} ({todo.nvcc.path}); a first build takes minutes")
    libraries = build(todo)
    for library in libraries:
        size = library.stat().st_size / 1e6
        codes = {REGISTER: "", CONVOLUTIONS: "  sm_90a"}
        code = codes.get(library.name, f"  {todo.architectures}")
        typer.echo(f"{library.name:<{len(REGISTER)}}  {size:6.2f} MB{code}")
    typer.echo(f"written to {output}")
    if todo.headers is not None:
        version = todo.headers.version
        typer.echo(f"{PLUGIN}: TensorRT {version} headers ({todo.headers.path})")
        typer.echo(f"{REGISTER}: for TensorRT {version.partition('.')[0]} alone")
    else:
        typer.echo(
            f"left out: {PLUGIN}, for no headers of TensorRT 10 or later were found; set "
            "TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h, or 'pip install --no-deps "
            f"kernel-lens==2.0.1', and build again ({KERNELS} does not need them)"
        )


def _architectures(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise PluginError(f"--arch {text}: numbers with commas between expected, as 80,90")
    return [int(part) for part in parts]


def main() -> None:
    """Entry point: a user error is one line and exit code 2, without a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    usage_error: Any = typer.BadParameter.__base__  # which typer does not name
    try:
        sys.exit(app(prog_name="build-plugin", standalone_mode=False) or 0)
    except PluginError as error:
        print(getattr(error, "output", ""), end="", file=sys.stderr)  # noqa: T201
        problem = str(error)
    except usage_error as error:
        problem = f"{error.format_message().rstrip('.')}; see 'build-plugin --help'"
    print(f"build-plugin: error: {problem}", file=sys.stderr)  # noqa: T201
    sys.exit(2)

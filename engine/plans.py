"""The commands that make plans: ``engine build`` and ``engine refit``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.manifest import Manifest

Force = Annotated[
    bool, typer.Option("--force", help="Replace the output where it is another file.")
]

_BATCHES, _PLAN, _BUILDER = "Batches", "The plan", "The build"
"""Groups of options in the help."""


def build(
    model: Annotated[Path, typer.Argument(help="Surgered .onnx, float or INT8.")],
    backend: Annotated[str, typer.Option(help="tensorrt or tensorrt-rtx.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Engine file to write.", show_default=False)
    ],
    *,
    min_batch: Annotated[
        int, typer.Option(min=1, help="Smallest batch.", rich_help_panel=_BATCHES)
    ] = 1,
    opt_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batch to tune for.",
            show_default="the largest",
            rich_help_panel=_BATCHES,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Largest batch.", rich_help_panel=_BATCHES)
    ] = 64,
    tf32: Annotated[
        bool,
        typer.Option(
            "--tf32", help="Allow TF32 where the graph is float32.", rich_help_panel=_PLAN
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Run on later releases too.", rich_help_panel=_PLAN
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Run on every GPU from Ampere on.",
            rich_help_panel=_PLAN,
        ),
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="Target of tensorrt-rtx, e.g. 8.9; may be repeated.",
            show_default="portable",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    strip_plan: Annotated[
        bool, typer.Option("--strip-plan", help="Leave the weights out.", rich_help_panel=_PLAN)
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Keep the plan refittable.", rich_help_panel=_PLAN)
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            help="Plugin library; repeatable.", show_default="none", rich_help_panel=_PLAN
        ),
    ] = None,
    memory_pool: Annotated[
        list[str] | None,
        typer.Option(
            help="POOL=MIB, e.g. workspace=4096; may be repeated.",
            show_default="TensorRT's",
            rich_help_panel=_BUILDER,
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="File to read and extend.",
            show_default="engines/timing.cache in the build folder; none for rtx",
            rich_help_panel=_BUILDER,
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=5,
            metavar="0-5",
            help="Effort.",
            show_default="TensorRT's",
            rich_help_panel=_BUILDER,
        ),
    ] = None,
    verbosity: Annotated[
        Literal["error", "warning", "info", "verbose"],
        typer.Option(
            metavar="LEVEL",
            help="Messages to show: error, warning, info or verbose.",
            rich_help_panel=_BUILDER,
        ),
    ] = "warning",
    layer_info: Annotated[
        Path | None,
        typer.Option(
            help="JSON of the engine inspector.", show_default="none", rich_help_panel=_BUILDER
        ),
    ] = None,
    device: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="GPU to build on.",
            show_default="0; none for rtx",
            rich_help_panel=_BUILDER,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Build an engine file of MODEL, and its manifest beside it.

    An engine whose manifest says that it was built from the same model, by the same version, for
    the same GPU and with the same options is left; any other file is replaced only with --force,
    and without it refused before the build.
    """
    from engine.backends.tensorrt.build import build as build_engine
    from engine.backends.tensorrt.options import BuildOptions
    from engine.model import load_detector

    if timing_cache is None and backend == "tensorrt":
        timing_cache = Path(os.environ.get("BUILD_DIR", "build")) / "engines" / "timing.cache"
    options = BuildOptions(
        min_batch=min_batch,
        opt_batch=opt_batch,
        max_batch=max_batch,
        memory_pools=dict(_memory_pool(text) for text in memory_pool or ()),
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        tf32=tf32,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        strip_plan=strip_plan,
        refit=refit,
        verbosity=verbosity,
        layer_info=layer_info,
        plugins=tuple(plugin or ()),
        compute_capabilities=tuple(compute_capability or ()),
        device=device,
    )
    detector = load_detector(model)
    _make(lambda: build_engine(detector, backend, output, options, overwrite=force), output, force)


def refit(
    plan: Annotated[Path, typer.Argument(help="Plan built with --refit or --strip-plan.")],
    model: Annotated[Path, typer.Argument(help="The same network with other weights, .onnx.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Plan to write.", show_default=False)
    ],
    *,
    device: Annotated[int, typer.Option(min=0, help="GPU that the plan is for.")] = 0,
    force: Force = False,
) -> None:
    """Put MODEL's weights into PLAN in seconds, and write it with its manifest.

    PLAN stays as it is. Hold the new one against MODEL with 'engine compare', as after a build. An
    engine that holds these weights already is left, any other file is replaced only with --force.
    """
    from engine.backends.tensorrt.refit import refit as refit_plan
    from engine.model import load_detector

    detector = load_detector(model)
    _make(lambda: refit_plan(plan, detector, output, device, overwrite=force), output, force)


def _make(make: Callable[[], Manifest], output: Path, force: bool) -> None:
    """Make a plan and say what became of it: without force, one that was there stays."""
    existed = output.exists() and not force
    manifest = make()
    if existed:
        say(output, written=False)
    else:
        typer.echo(f"wrote {output}: {manifest.engine_bytes} bytes in {manifest.seconds:.1f} s")


def say(output: Path, *, written: bool) -> None:
    """Say what became of an output."""
    typer.echo(f"wrote {output}" if written else f"{output} is up to date")


def _memory_pool(text: str) -> tuple[str, int]:
    name, separator, size = text.partition("=")
    if not separator or not size.isdecimal():
        raise EngineError(f"--memory-pool {text}: POOL=MIB expected, e.g. workspace=4096")
    return name, int(size) << 20

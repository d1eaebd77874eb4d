"""The commands ``harness download data`` and ``harness download model``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graph_surgery.command import printable
from harness.benchmarks import BENCHMARKS, DEFAULT
from harness.cli.options import BuildDir
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.download.download import Fetched

download_app = typer.Typer(
    help="Fetch the benchmark's data and models; what is there and right is left alone.",
    no_args_is_help=True,
)

_FETCHED = tuple(name for name, one in BENCHMARKS.items() if one.models)

_Mirror = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Stands for scheme and host of the original addresses.",
        show_default="the original servers",
    ),
]


@download_app.command()
def data(
    *,
    demo: Annotated[
        bool, typer.Option("--demo", help="The shipped demo set: check that it is whole.")
    ] = False,
    mirror: _Mirror = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Put COCO val2017, its annotations and the calibration images in place.

    Of train2017 only the images of data_maps/coco/cal_map.txt are fetched. The archives, together
    1.1 GB, are removed once unpacked. The demo set is used where it lies, in demo/data.
    """
    from harness.download.download import check_demo, download_coco

    if demo and mirror is not None:
        raise HarnessError("--demo downloads nothing, so it takes no --mirror")
    _print(check_demo() if demo else download_coco(build_dir, mirror, _notify))


@download_app.command()
def model(
    *,
    benchmark: Annotated[str, typer.Option(help=f"One of: {', '.join(_FETCHED)}.")] = DEFAULT.name,
    mirror: _Mirror = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Put the benchmark's checkpoint and its official ONNX export in place."""
    from harness.download.download import download_models
    from harness.make.arguments import choice

    known = BENCHMARKS[choice(benchmark, _FETCHED, "benchmark")]
    _print(download_models(known, build_dir, mirror, _notify))


def _notify(line: str) -> None:
    typer.echo(printable(line), err=True)  # servers say some of it


def _print(fetched: tuple[Fetched, ...]) -> None:
    for item in fetched:
        what = "" if item.files == 1 else f"{item.files} files, "
        how = "checked" if not item.new else f"{item.new} downloaded" if what else "downloaded"
        typer.echo(f"{item.place}: {what}{how}")

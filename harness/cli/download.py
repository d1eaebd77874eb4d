"""The commands ``harness download data`` and ``harness download model``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graph_surgery.command import printable
from harness.benchmarks import BENCHMARKS, DEFAULT, Description
from harness.cli.options import BuildDir
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.download.files import Fetched

download_app = typer.Typer(
    help="Fetch the benchmark's data and models; what is there and right is left alone.",
    no_args_is_help=True,
)

_FETCHED = tuple(name for name, one in BENCHMARKS.items() if one.models)

_Benchmark = Annotated[str, typer.Option(help=f"One of: {', '.join(_FETCHED)}.")]
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
    benchmark: _Benchmark = DEFAULT.name,
    demo: Annotated[
        bool, typer.Option("--demo", help="The shipped demo set: check that it is whole.")
    ] = False,
    mirror: _Mirror = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Put a benchmark's images and annotations in place, validation and calibration.

    COCO of ssd-resnet34: val2017, and of train2017 the images of data_maps/coco/cal_map.txt. The
    archives, together 1.1 GB, are removed once unpacked.

    Open Images of retinanet: the 24,781 validation images with a box of its classes, about 7.7 GB,
    and those of data_maps/openimages/cal_map.txt, one by one; annotations and map are made of them.

    The demo set is used where it lies, in demo/data.
    """
    from harness.download.download import check_demo, download_data

    if demo and mirror is not None:
        raise HarnessError("--demo downloads nothing, so it takes no --mirror")
    _print(check_demo() if demo else download_data(_known(benchmark), build_dir, mirror, _notify))


@download_app.command()
def model(
    *,
    benchmark: _Benchmark = DEFAULT.name,
    mirror: _Mirror = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Put the benchmark's checkpoint and its official ONNX export in place."""
    from harness.download.download import download_models

    _print(download_models(_known(benchmark), build_dir, mirror, _notify))


def _known(benchmark: str) -> Description:
    from harness.make.arguments import choice

    return BENCHMARKS[choice(benchmark, _FETCHED, "benchmark")]


def _notify(line: str) -> None:
    typer.echo(printable(line), err=True)  # servers say some of it


def _print(fetched: tuple[Fetched, ...]) -> None:
    for item in fetched:
        what = "" if item.files == 1 else f"{item.files} files, "
        how = "checked" if not item.new else f"{item.new} downloaded" if what else "downloaded"
        typer.echo(f"{item.place}: {what}{how}")

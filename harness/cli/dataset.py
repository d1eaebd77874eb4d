"""The command ``harness dataset add``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from engine.support.progress import progress_bar
from harness.benchmarks import DEFAULT, benchmark_of_file
from harness.cli.options import BuildDir

dataset_app = typer.Typer(help="Data sets of your own.", no_args_is_help=True)


@dataset_app.callback()
def dataset() -> None:
    """Data sets of your own."""


@dataset_app.command()
def add(
    name: Annotated[str, typer.Argument(help="What --dataset calls it.", show_default=False)],
    *,
    images: Annotated[Path, typer.Option(help="Folder of the images.", show_default=False)],
    annotations: Annotated[
        Path, typer.Option(help="COCO instances file of these images.", show_default=False)
    ],
    calibration_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of other images, for INT8; they need no annotations.", show_default=False
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file or engine: list all of its classes, in its order, and match the "
            "categories by their names.",
            show_default="the file's own order",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the data set of this name.")
    ] = False,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Make a data set of your images: check all, write its maps, say what is in it.

    The maps go into data_maps/NAME, and links to your files into data/NAME of the build folder;
    the images stay where they are. Label L of a model is the L-th category of the annotations: with
    --model, a copy of them with the model's classes as its categories lies in data/NAME, too.
    """
    from harness.data.own import add_dataset

    with progress_bar("check the images") as progress:
        added = add_dataset(
            name,
            images,
            annotations,
            calibration_images,
            build_dir,
            force=force,
            model=model,
            progress=progress,
        )
    (low, high), objects = added.sizes, sum(added.categories.values())
    typer.echo(
        f"{name}: {len(added.val)} images, {low[1]}x{low[0]} to {high[1]}x{high[0]}, {objects} "
        f"objects in {len(added.categories)} categories; {len(added.cal)} calibration images"
    )
    for number, (category, count) in enumerate(added.categories.items(), 1):
        if model is not None and not count:
            continue  # a class of the model alone
        shown = category if category.isprintable() else ascii(category)
        typer.echo(f"  category {number}: {shown}, {count} objects")
    for oddity in added.oddities:
        typer.echo(f"warning: {oddity}", err=True)
    if not added.cal:
        typer.echo("no images for calibration, which INT8 needs: --calibration-images DIR")
    if model is not None:
        typer.echo(
            f"categories are the classes of {model}, in a copy of {annotations}: where that "
            "changes, add it again"
        )
    else:
        typer.echo("for a MODEL with other classes, or in another order: add it with --model MODEL")
    quoted, accuracy = shlex.quote(name), "--test_mode=AccuracyOnly"
    given, known = "MODEL", DEFAULT
    if model is not None:
        given, known = shlex.quote(str(model)), benchmark_of_file(model)
    if added.cal:
        of = "" if known == DEFAULT else f"--benchmarks={known.name} "
        typer.echo(
            f'next, for INT8: make run WEIGHTS=FILE RUN_ARGS="{of}--dataset {quoted} {accuracy}"'
        )
    typer.echo(
        f"next, for {given} as it is: harness preprocess {given} --dataset {quoted} --val_only, "
        f"then harness run {given} --dataset {quoted} {accuracy}"
    )

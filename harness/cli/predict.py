"""``harness predict``: detections on any pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from engine.load import BACKENDS
from engine.support.progress import progress_bar
from graph_surgery.command import complain
from harness.cli.options import BuildDir, Device, RunBackend, Threads, Url
from harness.errors import HarnessError
from harness.results.devices import AUTO, fastest, load_engines, parse_urls


def predict(
    model: Annotated[Path, typer.Argument(help="An .onnx or a built engine.", show_default=False)],
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders of images, or patterns, as 'shots/**/*.png'.", show_default=False
        ),
    ],
    *,
    engine: RunBackend = None,
    score: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Detections below are left out.")
    ] = 0.5,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the pictures and predictions.json.",
            show_default="predictions/<time> in the build folder",
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help="Class names, one a line.", show_default="those in the model"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of the output folder that are others.")
    ] = False,
    device: Device = None,
    url: Url = None,
    threads: Threads = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Draw what MODEL detects on IMAGES.

    Each image gets a picture NAME.jpg with boxes, or NAME-2.jpg where several have the name, which
    the table says; small ones are enlarged. predictions.json is a
    list as of COCO results: boxes [x, y, width, height] in pixels of the image; image_id, its
    number in the table; category_id, the model's label. An image that cannot be read is named,
    the others go on, and the exit code is 1.
    """
    from engine.inspect import read_model
    from engine.model import size_guess
    from harness.predict import BATCH, class_names, find_images
    from harness.predict import predict as predict_images
    from harness.results.run_all import new_folder

    files = find_images(images)
    urls = None if url is None else parse_urls(url)
    if urls is not None and len(urls) > 1:
        raise HarnessError("predict asks one server; give one --url")
    known = read_model(model)
    called = class_names(known, names)
    engine = engine or BACKENDS[0]
    if engine == AUTO:
        way = fastest(model, device, threads, BATCH, build_dir)
        engine, model, device = way.backend, Path(way.file), way.device
    (loaded,) = load_engines(
        engine, model, device=device, devices=None, threads=threads, urls=urls, max_batch=BATCH
    )
    folder = output or new_folder(build_dir / "predictions")
    with progress_bar("predict") as progress:
        found, bad = predict_images(
            loaded, files, called, folder, score=score, overwrite=force, progress=progress
        )
    _print_table([(one.number, one.image, one.picture, one.names) for one in found])
    for image, reason in bad.items():
        complain("harness", f"{image}: {reason}")
    typer.echo(f"{len(found)} pictures and predictions.json in {folder}")
    if guess := size_guess(known.metadata):
        typer.echo(
            f"the model's image size, {guess}, is a guess; if it was trained at another, export it "
            "with --image-size SIDE (make: IMAGE_SIZE=SIDE)"
        )
    if bad:
        raise typer.Exit(1)


def _print_table(found: list[tuple[int, Path, Path, tuple[str, ...]]]) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    from graph_surgery.terminal import new_console

    table = Table(
        Column("", no_wrap=True), *(Column(n, overflow="fold") for n in ("image", "detections"))
    )
    for number, image, picture, names in found:
        drawn = "" if picture.stem == image.stem else f" ({picture.name})"
        counts = ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())
        table.add_row(str(number), escape(f"{image}{drawn}"), escape(counts or "–"))
    new_console(highlight=False).print(table)

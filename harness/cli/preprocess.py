"""``harness preprocess``: the images of a data set as engine input."""

from __future__ import annotations

import functools
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from engine.load import BACKENDS
from engine.manifest import load_manifest
from engine.protocol import InputSpec
from harness.benchmarks import DEFAULT, benchmark_of_file
from harness.cli.options import BuildDir, DatasetName
from harness.data.dataset import check_annotated, check_images, known_dataset, preprocessed_dir
from harness.data.record import recorded_images
from harness.errors import HarnessError
from harness.make.arguments import choice

Format = Literal["fp32", "int8_linear"]
FORMATS: tuple[Format, ...] = get_args(Format)

IMAGE = "image"
"""The image input, where no MODEL says its name: that of export-onnx and of the official ONNX."""


def preprocess(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="What to make input for: an .onnx or a built engine.",
            show_default="the benchmark's",
        ),
    ] = None,
    *,
    engine: Annotated[
        str, typer.Option(help="As of 'harness run'; the file says its input, whatever runs it.")
    ] = BACKENDS[0],
    dataset: DatasetName = None,
    val_only: Annotated[bool, typer.Option("--val_only", help="No calibration images.")] = False,
    cal_only: Annotated[bool, typer.Option("--cal_only", help="No validation images.")] = False,
    formats: Annotated[
        str | None,
        typer.Option(
            "--formats",
            help=f"Of the validation images, comma-separated: {', '.join(FORMATS)}. Calibration "
            "images are always fp32.",
            show_default="int8_linear with an INT8 MODEL or --calibration, else fp32",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Cache of 'engine calibrate' with the scale of int8_linear.",
            show_default="the scale of an INT8 MODEL",
        ),
    ] = None,
    preprocessed: Annotated[
        Path | None,
        typer.Option(
            help="Link to the result, if it is one set.",
            show_default="in preprocessed_data of the build folder",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="one per CPU")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Do finished images again.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out missing and corrupt images.")
    ] = False,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Turn the validation and the calibration images of a data set into engine input, once.

    A second call does what is new or has changed.
    """
    choice(engine, BACKENDS, "engine")
    if val_only and cal_only:
        raise HarnessError("--val_only and --cal_only leave nothing to do; give one of them")
    chosen = () if formats is None else _formats(formats)
    if cal_only and ("int8_linear" in chosen or calibration is not None):
        raise HarnessError(
            "calibration images are always fp32, their scale is yet to be found: with --cal_only, "
            "leave out --calibration and --formats int8_linear"
        )
    if dataset is None:
        dataset = (benchmark_of_file(model) if model else DEFAULT).dataset
    val = known_dataset(dataset, "val", build_dir)
    taken = None if model is None else _input_of(model)
    specs = _specs(model, taken, val.image_size, calibration)
    tasks = []
    if not cal_only:
        check_annotated(val)
        for name in chosen or tuple(specs)[-1:]:
            if name not in specs:
                raise HarnessError(
                    f"{name} needs the scale of the image: give an INT8 MODEL, or the cache of "
                    "'engine calibrate' as --calibration"
                )
            tasks.append((val, specs[name]))
    if not val_only:
        tasks.append((known_dataset(dataset, "cal", build_dir), specs["fp32"]))
    if preprocessed is not None and len(tasks) > 1:
        raise HarnessError(
            f"--preprocessed takes one set and these are {len(tasks)}; give --val_only or "
            "--cal_only, and one of --formats"
        )
    for data, _ in tasks:
        check_images(data)  # of all, before the work for the first
    from harness.data.oddities import oddities
    from harness.data.preprocess import preprocess as preprocess_images

    for data, spec in tasks:
        directory = preprocessed or preprocessed_dir(build_dir, data, spec)
        # a set without its bad images is none that `make` may use again
        record = nullcontext() if skip_bad else recorded_images(data, spec, directory)
        with record:
            done = preprocess_images(
                data,
                spec,
                directory,
                workers=workers or len(os.sched_getaffinity(0)),
                overwrite=overwrite,
                skip_bad=skip_bad,
                progress=sys.stderr.isatty(),
                say=functools.partial(typer.echo, err=True),
            )
        typer.echo(f"{len(done.files)} images in {directory}")
        for warning in oddities(data, done, model):
            typer.echo(f"warning: {warning}", err=True)


def _input_of(model: Path) -> InputSpec:
    """Input of a model; a built engine's is in its manifest, whatever can run it here."""
    if model.suffix != ".onnx":
        return load_manifest(model).input
    from engine.model import load_detector

    return load_detector(model).input


def _formats(text: str) -> tuple[Format, ...]:
    """Formats of a comma-separated list, each once."""
    names = [word.strip() for word in text.split(",")]
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise HarnessError(f"unknown format {unknown[0]!r}; choose of: {', '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names)


def _specs(
    model: Path | None, taken: InputSpec | None, image_size: int, calibration: Path | None
) -> dict[Format, InputSpec]:
    """Engine input in every format that is known: fp32, and int8_linear if there is a scale.

    Raises
    ------
    HarnessError
        Two scales, a cache of another image size, or one without a scale for the image.
    EngineError
        A damaged cache.
    """
    name = IMAGE if taken is None else taken.name
    shape = (3, image_size, image_size) if taken is None else taken.shape
    specs: dict[Format, InputSpec] = {"fp32": InputSpec(name, shape, "float32")}
    if taken is not None and taken.dtype == "int8":
        if calibration is not None:
            raise HarnessError(
                f"{model} is INT8 and has a scale of its own; leave out --calibration"
            )
        specs["int8_linear"] = taken
    elif calibration is not None:
        from engine.data.preprocessed import preprocessing_sha256
        from engine.quantization.cache import Calibration
        from engine.quantization.scales import activation_scale

        cache = Calibration.load(calibration)
        if cache.preprocessing_sha256 != preprocessing_sha256(shape):
            raise HarnessError(
                f"{calibration} does not belong to images of {shape[1]}x{shape[2]} with this "
                "normalisation; give the MODEL that was calibrated, or calibrate again"
            )
        if name not in cache.scales:
            raise HarnessError(f"{calibration} has no scale for {name!r}, the image of the model")
        # as in the INT8 graph that this cache makes
        scale = float(activation_scale(cache.scales[name]))
        specs["int8_linear"] = InputSpec(name, shape, "int8", scale)
    return specs

"""The ``engine`` command. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.errors import EngineError, naming
from engine.plans import Force, build, refit, say
from engine.protocol import InputSpec
from engine.support.command import run_command
from engine.support.progress import progress_bar
from graph_surgery.command import printable

if TYPE_CHECKING:
    from engine.model import Detector

app = typer.Typer(
    help="Calibrate, quantise, build and compare detectors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_Model = Annotated[Path, typer.Argument(help="Surgered FP32 .onnx.", show_default=False)]
_Cache = Annotated[
    Path, typer.Argument(help="Calibration cache of 'engine calibrate'.", show_default=False)
]
_Data = Annotated[
    Path,
    typer.Option(help="Folder of float32 images of 'harness preprocess'.", show_default=False),
]
_Batch = Annotated[int, typer.Option(min=1, help="Images that run together.")]
_Json = Annotated[
    Path | None, typer.Option("-o", "--output", help="JSON file.", show_default="none")
]


@app.command()
def calibrate(
    model: _Model,
    data: _Data,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Cache to write.", show_default=False)
    ],
    *,
    method: Annotated[
        str,
        typer.Option(
            help="auto (the least squared error, as a share of each image's power), entropy or "
            "minmax (the largest value)."
        ),
    ] = "auto",
    images: Annotated[
        int | None, typer.Option(min=1, help="Take the first N images.", show_default="all")
    ] = None,
    batch: _Batch = 1,
    device: Annotated[
        str, typer.Option(help="What runs MODEL: cpu, cuda or cuda:N, with onnxruntime-gpu.")
    ] = "cpu",
    cache_format: Annotated[
        Literal["json", "trt"],
        typer.Option("--format", help="trt: also write TensorRT's text format, as CACHE.trt."),
    ] = "json",
    force: Force = False,
) -> None:
    """Find the scale of every quantised activation of MODEL.

    The scale of the image follows from what pixels are. The table at the end shows the tensors to
    which quantisation does most: their scales by all methods, the share of values that is clipped
    and the signal-to-noise ratio. A cache that holds the scales of this model, these images and
    this method already is left as it is, one of MODEL as it was before is renewed; any other file
    is replaced only with --force, and without it refused before the images are run.
    """
    from engine.data.preprocessed import MANIFEST, load_preprocessed
    from engine.model import load_detector
    from engine.quantization.cache import Calibration
    from engine.quantization.calibration import calibrate as calibrate_model
    from engine.quantization.calibration import is_current
    from engine.report import calibration_report, warn
    from engine.support.files import another, check_output, write_output
    from graph_surgery.terminal import new_console

    text = output.with_name(f"{output.name}.trt") if cache_format == "trt" else None
    outputs = [output, *([text] if text else [])]
    for path in outputs:
        check_output(path, [model, data / MANIFEST])
    detector = load_detector(model)
    source = load_preprocessed(data, _image_spec(detector), split="cal")
    current = output.exists() and is_current(output, detector, source, method=method, limit=images)
    if current:
        cache = Calibration.load(output)
        typer.echo(f"{output} is up to date")
    else:
        force = force or current is None
        for path in outputs:
            if path.exists() and not force:
                raise another(path)
        with progress_bar("calibrate") as progress:
            cache = calibrate_model(
                detector,
                source,
                method=method,
                limit=images,
                batch=batch,
                device=device,
                progress=progress,
            )
        cache.save(output)
        typer.echo(f"wrote {output}")
    if text is not None:
        write_output(text, cache.to_trt().encode(), overwrite=force)
        typer.echo(f"TensorRT's format in {text}")
    new_console().print(calibration_report(cache))
    warn(cache)


@app.command()
def equalise(
    model: _Model,
    data: _Data,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="FP32 .onnx to write.", show_default=False)
    ],
    *,
    force: Force = False,
) -> None:
    """Write MODEL, FP32 still, with channels whose ranges on images are nearer to each other.

    The detections stay as they are; INT8 loses less of them, as a tensor's channels share one
    scale. 'engine calibrate' and 'engine quantize' take the file that is written in MODEL's place.

    A file that holds this graph already is left as it is, any other is replaced only with --force.
    """
    from engine.data.preprocessed import MANIFEST, load_preprocessed
    from engine.model import load_detector
    from engine.quantization.equalise import equalise as equalise_model
    from engine.support.files import check_output
    from graph_surgery.files import data_files, save

    check_output(output, [model, data / MANIFEST])
    detector = load_detector(model)
    check_output(output, data_files(detector.model))
    source = load_preprocessed(data, _image_spec(detector), split="cal")
    with naming(model), progress_bar("equalise") as progress:
        equalised = equalise_model(detector, source, progress=progress)
    say(output, written=save(equalised, output, overwrite=force))


@app.command()
def quantize(
    model: _Model,
    cache: _Cache,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="INT8 .onnx to write.")],
    *,
    float_type: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="Type of what is not INT8.")
    ] = "fp32",
    target: Annotated[
        Literal["gpu", "cpu"],
        typer.Option(help="cpu: for ONNX Runtime on CPUs alone, which runs this form faster."),
    ] = "gpu",
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            help="Shell pattern of layers to leave float, e.g. 'loc.*'; may be repeated.",
            show_default="none",
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Folder of float32 images of 'harness preprocess': hold OUT against MODEL on 16.",
            show_default="none",
        ),
    ] = None,
    correct: Annotated[
        Literal["bias"] | None,
        typer.Option(
            help="bias: take off each bias what quantisation adds on average. Needs --data.",
            show_default="none",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="For --correct: the folder that CACHE is calibrated from.", show_default="none"
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write MODEL as an INT8 graph with explicit Q/DQ and an INT8 image input.

    A file that holds this graph already is left as it is, one of MODEL as it was before is renewed,
    any other is replaced only with --force.
    Where MODEL keeps data in files beside it, or 2 GiB do not hold OUT, OUT has its data in
    OUT.HASH.data. --correct runs the images of the calibration once more. With --check the exit
    code is 1 when OUT finds less than 0.8 of what MODEL finds on the images (same label, IoU at
    least 0.5).
    """
    from engine.data.preprocessed import load_preprocessed
    from engine.model import load_detector
    from engine.quantization.bias import correct_biases
    from engine.quantization.cache import Calibration
    from engine.quantization.quantize import is_outdated
    from engine.quantization.quantize import quantize as quantize_model
    from engine.report import agreement_lines, warn
    from engine.support.files import check_output
    from graph_surgery.files import data_files, save

    check_output(output, [model, cache])
    if (correct is None) != (data is None):
        raise EngineError("--correct and --data go together: what to correct, and on which images")
    calibration = Calibration.load(cache)
    detector = load_detector(model)
    check_output(output, data_files(detector.model))
    images = None if check is None else load_preprocessed(check, _image_spec(detector), split="cal")
    warn(calibration)
    biases = None
    with naming(f"{model} with {cache}"):
        if data is not None:
            seen = load_preprocessed(data, _image_spec(detector), split="cal")
            with progress_bar("correct") as progress:
                biases = correct_biases(
                    *(detector, calibration, seen),
                    float_type=float_type,
                    target=target,
                    progress=progress,
                )
        quantized = quantize_model(
            detector.model,
            calibration,
            float_type=float_type,
            keep_float=keep_float or (),
            target=target,
            biases=biases,
        )
    force = force or is_outdated(output, quantized)
    say(output, written=save(quantized, output, overwrite=force))
    if images is not None:
        from engine.comparison.agreement import find_agreement
        from graph_surgery.terminal import new_console

        found = find_agreement(model, output, images)
        new_console().print(agreement_lines(found, calibration))
        if not found.passed:
            sys.exit(1)


app.command()(build)
app.command()(refit)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Reference: .onnx or engine file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="What is held against it.")],
    *,
    backend: Annotated[
        Literal["onnxruntime", "cudnn"],
        typer.Option("--engine", help="What runs B where it is an .onnx file."),
    ] = "onnxruntime",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of float32 images of 'harness preprocess'.", show_default="none"),
    ] = None,
    random: Annotated[
        int | None, typer.Option(min=1, help="N images of noise instead.", show_default="none")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Take the first N images.", show_default="all")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO annotations of the images, for the mAP.", show_default="none"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file that a plan among A and B was built from.",
            show_default="looked for beside it",
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Also every tensor between layers; names the first that is off."
        ),
    ] = False,
    snr: Annotated[
        float | None,
        typer.Option(
            help="Least SNR of a head tensor in dB.",
            show_default="60; INT8: 15; one INT8 graph: 20",
        ),
    ] = None,
    matched: Annotated[
        float | None,
        typer.Option(help="Least share of detections matched.", show_default="0.99; INT8: 0.8"),
    ] = None,
    score: Annotated[
        float | None,
        typer.Option(help="Largest difference in score.", show_default="0.01; INT8: 0.3"),
    ] = None,
    output: _Json = None,
    force: Force = False,
) -> None:
    """Compare the head tensors and the detections of A and B on the same images.

    The exit code is 1 when they differ by more than the tolerance: the median over the images of a
    head tensor's SNR, the share of detections of both sides that have a partner (same label, IoU
    at least 0.9), their scores, and, with annotations, the mAP of B, which may be 0.1 % below that
    of A, or 1 % where one of them is INT8.

    To show the head tensors of a plan, its ONNX file is built once more with them as outputs, with
    the plan's options and timing cache. Where B is INT8 and not run by ONNX Runtime, the heads are
    also held against ONNX Runtime on B's own graph: that is the engine's share of the difference.

    A JSON file with the same figures of the same files is left. One of other files, images or
    tolerances is refused before the work, one with other figures after it, but for --force.
    """
    from engine.comparison.files import compare_files, save_comparison
    from engine.data.preprocessed import MANIFEST
    from engine.support.files import check_output

    if output is not None:
        read = (first, second, annotations, model, data and data / MANIFEST)
        check_output(output, [path for path in read if path is not None])
    found, document = compare_files(
        first,
        second,
        data=data,
        random=random,
        limit=images,
        annotations=annotations,
        backend=backend,
        source=model,
        layers=layers,
        overrides={"snr": snr, "matched": matched, "score": score},
        kept=None if force else output,
    )
    from engine.report import comparison_tables
    from graph_surgery.terminal import new_console

    new_console().print(comparison_tables(found))
    if output is not None:
        say(output, written=save_comparison(output, document, overwrite=force))
    if not found.passed:
        sys.exit(1)


@app.command()
def sensitivity(
    model: _Model,
    cache: _Cache,
    data: _Data,
    *,
    images: Annotated[int, typer.Option(min=1, help="Take the first N images.")] = 8,
    batch: _Batch = 1,
    output: _Json = None,
    force: Force = False,
) -> None:
    """Rank the layers of MODEL by what their quantisation does to the heads.

    Gain is what leaving one layer float gives, in dB; the last line has the --keep-float to pass to
    'engine quantize' for the layers that gain most.

    A JSON file with the same figures is left, any other is replaced only with --force.
    """
    from dataclasses import asdict

    from engine.data.preprocessed import MANIFEST, load_preprocessed
    from engine.model import load_detector
    from engine.quantization.cache import Calibration
    from engine.quantization.sensitivity import sensitivity as find_sensitivity
    from engine.report import sensitivity_advice, sensitivity_table
    from engine.support.files import check_output, json_text, write_output
    from graph_surgery.terminal import new_console

    if output is not None:
        check_output(output, [model, cache, data / MANIFEST])
    detector = load_detector(model)
    source = load_preprocessed(data, _image_spec(detector), split="cal")
    with naming(f"{model} with {cache}"), progress_bar("sensitivity") as progress:
        found = find_sensitivity(
            detector, Calibration.load(cache), source, limit=images, batch=batch, progress=progress
        )
    new_console().print(sensitivity_table(found))
    if output is not None:
        say(output, written=write_output(output, json_text(asdict(found)), overwrite=force))
    typer.echo(printable(sensitivity_advice(found)))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help=".onnx, engine or calibration cache.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second plan, beside the first.", show_default="none")
    ] = None,
    *,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of the timed batch.", show_default="the plan's best"),
    ] = None,
) -> None:
    """Show what FILE is: inputs, heads, quantisation, hashes, manifest, scales.

    Of a plan, on the GPU that it was built for, also its memory and its layers: tactic, format,
    type, and time on noise.
    """
    from engine.inspect import inspect_file, inspect_layers
    from engine.report import facts_table, plan_table
    from graph_surgery.terminal import new_console

    console = new_console()
    files = [file] if other is None else [file, other]
    for path in files:
        console.print(facts_table(path.name, inspect_file(path)))
    found = inspect_layers(files, batch)
    if isinstance(found, str):
        console.print(found, markup=False)
    elif found is not None:
        console.print(plan_table(*found))


def main() -> None:
    """Run the command; a user error is one line and exit code 2."""
    run_command(app, "engine")


def _image_spec(detector: Detector) -> InputSpec:
    """Image input of a surgered FP32 model."""
    from engine.quantization.placement import find_placement

    with naming(detector.path):
        placement = find_placement(detector.model)
    return InputSpec(placement.image, placement.shape, "float32")


if __name__ == "__main__":
    main()

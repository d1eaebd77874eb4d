"""``export-onnx``: weights to ONNX."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from export.errors import ExportError, needed_packages
from graph_surgery.command import run_command
from graph_surgery.errors import SurgeryError

app = typer.Typer(pretty_exceptions_enable=False)


def _image_shape(text: str) -> tuple[int, int]:
    """Height and width of ``800`` or ``600x800``."""
    height, x, width = text.partition("x")
    try:
        return int(height), int(width if x else height)
    except ValueError:
        raise ExportError(f"--image-size {text}: neither SIDE nor HEIGHTxWIDTH") from None


@app.command()
def export_onnx(
    *,
    weights: Annotated[
        Path, typer.Option(help=".safetensors, or any file of torch.save with the weights")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write")],
    model: Annotated[
        str | None,
        typer.Option(
            help="ssd-resnet34 or retinanet.", show_default="what the names of the weights tell"
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE|HEIGHTxWIDTH",
            help="Size of the input image.",
            show_default="the checkpoint's own, else the MLPerf model's, said to be a guess",
        ),
    ] = None,
    entry: Annotated[
        str,
        typer.Option(
            help="Entry of the checkpoint that holds the weights, as ema or a.b.",
            show_default="model, state_dict and others, in this order; said",
        ),
    ] = "",
    names: Annotated[
        Path | None,
        typer.Option(
            help="Class names, one a line.",
            show_default="the checkpoint's own, COCO's for as many classes",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output where it is another file")
    ] = False,
) -> None:
    """Export the weights of a detector to one ONNX file: image in, detections out.

    Detectors are MLPerf's SSD-ResNet34 and RetinaNet, of any width, number of classes and size.

    The file has a dynamic batch, folded batch norms and standard operators only. Before it is
    written, PyTorch and ONNX Runtime run it on the same images and must agree.

    An output that is the same already is left. Another file is replaced only with --force: without
    it, one whose metadata names other weights, sizes or names is refused before the export, any
    other after it.
    """
    with needed_packages():
        import onnx
        import onnxscript  # noqa: F401  # what is missing is missed before the work

        from export import agreement, checkpoint, onnx_export
        from export.names import choose_names
        from graph_surgery.files import check_output, save

    image_shape = _image_shape(image_size) if image_size else None
    check_output(output, [weights, *([names] if names else [])])
    start = time.monotonic()

    def say(text: str) -> None:
        typer.echo(f"[{time.monotonic() - start:5.1f} s] {text}")

    loaded = checkpoint.read_checkpoint(weights, model=model, entry=entry)
    config = checkpoint.infer_config(loaded, image_shape)
    class_names, source = choose_names(
        names, loaded.names, config.num_classes, background=loaded.architecture.background
    )
    detector = onnx_export.Detector(checkpoint.load_model(loaded, config)).eval()
    taken = f" ({loaded.entry})" if loaded.entry else ""
    say(f"read {weights}{taken}: {config}, {config.num_priors} default boxes")
    guess = ""
    if image_shape is None and loaded.config is None:
        guess = "x".join(map(str, config.image_shape))
        say(
            f"image size: guessed {guess}, which the weights do not tell; if it is "
            "another: --image-size"
        )
    say(f"class names: {len(class_names)}, {source}" if class_names else f"class names: {source}")
    facts = onnx_export.metadata(loaded, config, class_names, guess)
    if output.exists() and not force:
        onnx_export.check_record(output, facts)
    exported = onnx_export.export_detector(detector)
    say(
        f"exported {len(exported.graph.node)} nodes, opset {onnx_export.OPSET}; onnx.checker passed"
    )
    proof = agreement.compare_with_onnxruntime(detector, exported)
    say(
        f"PyTorch and ONNX Runtime agree: loc {proof.loc:.1e} and conf {proof.conf:.1e} of "
        f"their spread, {proof.detections} detections, boxes within {proof.box:.1e}, "
        f"scores within {proof.score:.1e}"
    )
    exported = onnx_export.without_heads(exported)
    onnx.helper.set_model_props(exported, facts)
    written = save(exported, output, overwrite=force)
    size = f"{output.stat().st_size / 2**20:.1f} MiB"
    say(f"wrote {output} ({size})" if written else f"{output} is up to date")


def main() -> None:
    """Entry point: a user error is one line and exit code 2, without a traceback."""
    run_command(app, "export-onnx", ExportError, SurgeryError, program="export-onnx")

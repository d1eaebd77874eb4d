"""``graph-surgery``: look at the postprocessing of a detector, and replace it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graph_surgery.command import printable, run_command
from graph_surgery.errors import SurgeryError

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Replace the postprocessing of an SSD detector by one NMS_OPT_TRT node.",
)


@app.command()
def nms(
    model: Annotated[Path, typer.Argument(metavar="IN.onnx", help="Detector to read")],
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="File to write")],
    names: Annotated[
        Path | None,
        typer.Option(
            help="Class names, one a line.",
            show_default="the model's own, COCO's for 80 classes",
        ),
    ] = None,
    plugin_alone: Annotated[
        bool,
        typer.Option(
            "--plugin-only",
            help="Leave out the definition of NMS_OPT_TRT, so that it can only be the plugin: for "
            "trtexec, polygraphy and other programs that give the file to TensorRT.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT.onnx where it is another file.")
    ] = False,
) -> None:
    """Make everything behind the head convolutions one NMS_OPT_TRT node.

    The old postprocessing and the new node run on the same random head tensors first; nothing is
    written unless they agree. A model that has the node already, as one of 'engine quantize', is
    copied as it is, but for class names and --plugin-only.

    Where IN.onnx keeps data in files beside it, or 2 GiB do not hold it, OUT.onnx has its data in
    OUT.onnx.HASH.data. An OUT.onnx that is the same already is left; any other is replaced only
    with --force.
    """
    from graph_surgery.files import check_output, data_files, load, save
    from graph_surgery.names import add_names
    from graph_surgery.nms_function import plugin_only
    from graph_surgery.replace import insert_nms

    check_output(output, [model, *([names] if names else [])])
    given = load(model)
    check_output(output, data_files(given))
    result = insert_nms(given)
    named = add_names(result.model, names)
    new = plugin_only(result.model) if plugin_alone else result.model
    written = save(new, output, overwrite=force)
    for change in (*result.changes, named):
        typer.echo(change)
    if plugin_alone:
        typer.echo("the definition of NMS_OPT_TRT was left out: only its plugin can run the file")
    verb = "wrote" if result.modified or plugin_alone else "copied to"
    typer.echo(f"{verb} {output}" if written else f"{output} is up to date")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Detector to read")],
) -> None:
    """Show what is known of any ONNX file, and what a detector lacks.

    Heads, anchors, how boxes are coded and ordered, scores, what suppresses, and the attributes of
    NMS_OPT_TRT, before or after the surgery. Where something is not understood: what was looked
    for, the nearest match and the remedy.
    """
    from graph_surgery.files import load
    from graph_surgery.inspect import tables
    from graph_surgery.survey import survey
    from graph_surgery.terminal import new_console

    known = survey(load(model))
    new_console().print(tables(known))
    for line in known.missing:
        typer.echo(f"not understood: {printable(line)}")


def main() -> None:
    """Entry point: a user error is one line and exit code 2, without a traceback."""
    run_command(app, "graph-surgery", SurgeryError, program="graph-surgery")

"""The commands ``harness report`` and ``harness accuracy``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import BuildDir
from harness.data.dataset import check_map, known_dataset, load_map
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.results.report import Runs


def accuracy(
    log: Annotated[Path, typer.Argument(help="mlperf_log_accuracy.json of any run.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="Its annotations and its map: coco, openimages, demo or another."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO annotations instead; the sample order is that of its images."),
    ] = None,
    labels_from: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1,
            help="Label of the first category: 0 of models without background, as RetinaNet.",
            show_default="what result.json beside the log says, else the data set's, else 1",
        ),
    ] = None,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Compute the COCO mAP of an accuracy log as MLPerf's scripts do.

    In the folder of a run of this harness, samples.txt says which image each sample is; elsewhere
    the data set's map or the order of the annotations does.
    """
    from engine.protocol import first_label
    from harness.results.accuracy import evaluate
    from harness.results.result import RESULT, read_result
    from harness.results.run import SAMPLES

    if (dataset is None) == (annotations is None):
        raise HarnessError("give either --dataset or --annotations")
    files, first = None, 1
    if dataset is not None:
        data = known_dataset(dataset, "val", build_dir)
        annotations, files, first = data.annotations, check_map(data), data.first_label
    if annotations is None:
        raise HarnessError(f"{dataset} has no annotations")
    if (log.parent / SAMPLES).exists():
        files = load_map(log.parent / SAMPLES)
    if labels_from is None and (log.parent / RESULT).exists():
        engine = read_result(log.parent / RESULT).engine
        labels_from = first_label(engine) if "first_label" in engine else None
    result = evaluate(log, annotations, files, first if labels_from is None else labels_from)
    for name, value in result.stats.items():
        typer.echo(f"{name:>6} {value:.4f}")
    typer.echo(f"{result.images_seen} of {result.images_total} images, ", nl=False)
    typer.echo(f"{result.detections} detections")
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"mAP={100 * result.mAP:.3f}%")  # the line that MLPerf's tools look for


def report(
    directories: Annotated[list[Path], typer.Argument(help="Folders of or above runs.")],
    *,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of a table.")] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Hold the second of two runs against the first."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write a page instead: HTML with charts and images, the runs side by side.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output where it is another file.")
    ] = False,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Print the results of runs again, or write them as a page.

    With --compare A B, or a folder of two runs: for each scenario and mode that both have, the
    figures of A and B with their differences, and what else differs: settings, versions, hashes,
    command. A page of several runs has the same.
    """
    from harness.results.report import find_results, print_table, to_csv, to_json

    if sum((json, csv, compare, output is not None)) > 1:
        raise HarnessError("give one of --json, --csv, --compare and --output")
    if compare:
        from harness.results.compare import print_comparison, two_sides

        print_comparison(*two_sides(directories))
        return
    results: Runs = find_results(directories)
    if output is not None:
        from engine.support.files import check_output, write_output
        from harness.results.page import render_page

        check_output(output, [])
        write_output(output, render_page(results, build_dir).encode(), overwrite=force)
        typer.echo(f"page in {output}")
    elif json or csv:
        typer.echo(to_json(results) if json else to_csv(results))
    else:
        print_table(results)

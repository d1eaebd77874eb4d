"""What the commands print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from glob import escape as glob_escape
from shlex import quote
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from engine.comparison.agreement import MIN_SHARE, Agreement
from engine.comparison.compare import Comparison, HeadDifference
from engine.quantization.cache import Calibration
from engine.quantization.sensitivity import Sensitivity
from engine.quantization.thresholds import METHODS
from graph_surgery.terminal import new_console

if TYPE_CHECKING:
    from engine.backends.tensorrt.layers import PlanDescription

_WORST = 8
"""Rows of the table of the worst tensors, and layers that are advised to be left float."""

_WORTH_DB = 1.0
"""Gain from which on it is advised to leave a layer float."""


def comparison_tables(found: Comparison) -> Group:
    """Format a comparison for a terminal."""
    heads = _differences(f"Head tensors on {found.images} images", found.heads, found.alone)
    pairs = found.detections
    detections = _table(
        "Detections",
        *("first", "second", "matched", "missed", "extra", "mean IoU", "largest score diff."),
    )
    counts = (pairs.first, pairs.second, pairs.matched, pairs.missed, pairs.extra)
    detections.add_row(*map(str, counts), f"{pairs.iou_mean:.4f}", f"{pairs.score_largest:.3g}")
    checks = _table("Verdict", "figure", "value", "bound", "")
    for check in found.checks:
        bound = f"{'>=' if check.at_least else '<='} {check.bound:.4g}"
        verdict = "passed" if check.passed else "[bold]FAILED[/]"
        checks.add_row(check.what, f"{check.value:.4g}", bound, verdict)
    parts: list[Table | str] = [heads]
    if not found.heads:
        parts = [
            "Head tensors were not compared: one side has none that are known. A built engine "
            "shows them when its ONNX file is beside it, or named with --model."
        ]
    if found.alone:
        parts.append(
            "Engine alone: B against ONNX Runtime on B's own graph, which it computes as written. "
            "What is left of the difference is the quantiser's."
        )
    if found.layers:
        parts.append(_differences("Other tensors, in the order of the graph", found.layers))
    parts.append(detections)
    if found.precision is not None:
        first, second = found.precision
        if math.isnan(first):
            parts.append("The images have no ground truth, so there is no mAP.")
        else:
            parts.append(f"mAP {first:.4f} and {second:.4f}, difference {second - first:+.4f}")
    return Group(*parts, checks)


def _differences(
    title: str, tensors: Sequence[HeadDifference], alone: Sequence[HeadDifference] = ()
) -> Table:
    extra = ("engine alone",) if alone else ()
    table = _table(
        title,
        *("tensor", "SNR dB, median", *extra, "least", "abs. diff., mean", "largest"),
        "rel., median",
    )
    by_name = {one.name: f"{one.snr_median:.1f}" for one in alone}
    for one in tensors:
        table.add_row(
            escape(one.name),
            f"{one.snr_median:.1f}",
            *([by_name.get(one.name, "")] if alone else []),
            f"{one.snr_least:.1f}",
            f"{one.absolute_mean:.3g}",
            f"{one.absolute_largest:.3g}",
            f"{one.relative_median:.3g}",
        )
    return table


def plan_table(plans: Mapping[str, PlanDescription], batch: int) -> Table:
    """Layers of one plan with all that is known of them, or of two side by side."""
    names = list(dict.fromkeys(layer.name for plan in plans.values() for layer in plan.layers))
    by_name = [{layer.name: layer for layer in plan.layers} for plan in plans.values()]
    one = len(plans) == 1
    columns = ("ms", "kind", "reads", "writes", "tactic") if one else ("ms", "writes", "tactic")
    table = Table(title=f"Layers, {batch} images", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for plan in plans:
        for column in columns:
            title = column if one else f"{escape(plan)}: {column}"
            table.add_column(title, overflow="fold")
    for name in names:
        cells = []
        for layers in by_name:
            layer = layers.get(name)
            values = (
                [""] * len(columns) if layer is None else [getattr(layer, c) for c in columns[1:]]
            )
            if layer is not None:
                values.insert(0, f"{layer.ms:.4f}")
            cells += values
        table.add_row(escape(name), *map(escape, cells))
    sums = [f"{sum(layer.ms for layer in plan.layers):.3f}" for plan in plans.values()]
    table.add_row("sum", *(cell for total in sums for cell in (total, *[""] * (len(columns) - 1))))
    table.caption = "\n".join(
        f"{escape(name)}: a session takes {plan.session_bytes / 2**20:.0f} MiB of GPU memory for "
        "what lies between layers"
        for name, plan in plans.items()
    )
    return table


def calibration_report(cache: Calibration) -> Group:
    """What a calibration took, and its worst tensors, those of the lowest SNR."""
    line = (
        f"{len(cache.scales)} scales from {cache.images} images by {cache.method}; that of the "
        "image, where it is quantised, from its pixels"
    )
    return Group(line, worst_tensors(cache))


def worst_tensors(cache: Calibration) -> Table:
    """Table of the `_WORST` tensors to which quantisation does most; it fits in 80 columns."""
    table = Table(title="Worst tensors: scale by method", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("tensor", overflow="fold")
    for column in (*METHODS, "clipped", "SNR dB"):
        table.add_column(column, justify="right", no_wrap=True)
    ranked = sorted(cache.statistics.items(), key=lambda item: item[1].snr_db)
    for name, one in ranked[:_WORST]:
        scales = (f"{one.scales[method]:.3g}" for method in METHODS)
        table.add_row(escape(name), *scales, f"{one.clipped:.3%}", f"{one.snr_db:.1f}")
    return table


def agreement_lines(found: Agreement, cache: Calibration) -> Group:
    """Say how far INT8 agrees with FP32; where it does not, with the tensors to look at."""
    if not found.detections:
        return Group(
            f"FP32 detects nothing on {found.images} images: INT8 could not be checked; give "
            "images of what it is to find"
        )
    line = (
        f"INT8 finds {found.matched} of {found.detections} FP32 detections on {found.images} "
        f"images again, {found.matched / found.detections:.3f} (at least {MIN_SHARE})"
    )
    if found.passed:
        return Group(line)
    if cache.warning is not None:
        return Group(f"FAILED: {line}, likely for the calibration images: see the warning")
    return Group(f"FAILED: {line}; look at these tensors", worst_tensors(cache))


def warn(cache: Calibration) -> None:
    """Say on stderr what speaks against the use of a calibration."""
    for text in (cache.changed, cache.warning):
        if text is not None:
            new_console(stderr=True).print(f"WARNING: {escape(text)}", style="bold")


def sensitivity_table(found: Sensitivity) -> Table:
    """Format a ranking of layers for a terminal."""
    total = found.all_quantized
    table = _table(
        f"SNR of the heads in dB on {found.images} images; all layers quantised: "
        f"loc {total.loc_db:.1f}, conf {total.conf_db:.1f}",
        *("layer", "only it INT8: loc", "conf", "only it float: loc", "conf", "gain"),
    )
    for row in found.layers:
        noise = (row.only_quantized, row.only_float)
        figures = [value for one in noise for value in (one.loc_db, one.conf_db)]
        table.add_row(escape(row.layer), *(f"{value:.1f}" for value in (*figures, row.gain_db)))
    return table


def sensitivity_advice(found: Sensitivity) -> str:
    """Say what gain means, and what to pass to quantize; two lines."""
    gaining = [row for row in found.layers if row.gain_db >= _WORTH_DB]
    gaining.sort(key=lambda row: -row.gain_db)
    patterns = [f"--keep-float {quote(glob_escape(row.layer))}" for row in gaining[:_WORST]]
    advice = f"no layer alone gains {_WORTH_DB:g} dB: none is worth a --keep-float"
    if patterns:
        advice = f"to leave float what gains most: engine quantize … {' '.join(patterns)}"
    return (
        "gain: the dB by which the worse of loc and conf gets better when that layer alone is left "
        f"float and all others are INT8; gains of several layers do not add up\n{advice}"
    )


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Format names and values for a terminal."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(escape(name), escape(str(value)))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        if index:  # figures, which stay whole
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        else:
            table.add_column(column, overflow="fold")
    return table

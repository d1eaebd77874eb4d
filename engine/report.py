"""What the commands print and write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from engine.compare import Comparison
from engine.files import write_atomically
from engine.protocol import EngineError
from engine.sensitivity import Sensitivity


def comparison_tables(found: Comparison) -> Group:
    """Format a comparison for a terminal."""
    heads = _table(
        f"Head tensors on {found.images} images",
        *("tensor", "SNR dB, median", "least", "abs. diff., mean", "largest", "rel., median"),
    )
    for head in found.heads:
        heads.add_row(
            head.name,
            f"{head.snr_median:.1f}",
            f"{head.snr_least:.1f}",
            f"{head.absolute_mean:.3g}",
            f"{head.absolute_largest:.3g}",
            f"{head.relative_median:.3g}",
        )
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
        parts = ["Head tensors were not compared: only ONNX files show them."]
    parts.append(detections)
    if found.precision is not None:
        first, second = found.precision
        if math.isnan(first):
            parts.append("The images have no ground truth, so there is no mAP.")
        else:
            parts.append(f"mAP {first:.4f} and {second:.4f}, difference {second - first:+.4f}")
    return Group(*parts, checks)


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


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Format names and values for a terminal."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(escape(name), escape(str(value)))
    return table


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all; null stands for a number that is not finite.

    Raises
    ------
    EngineError
        When it cannot be written.
    """
    text = json.dumps(_finite(document), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise EngineError(f"{path}: cannot write it: {error.strerror}") from error


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

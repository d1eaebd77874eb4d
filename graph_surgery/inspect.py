"""What the surgery sees in a model, as tables."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from graph_surgery.graph import import_graph
from graph_surgery.heads import Heads
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.pattern import find_nms_node, find_tail, read_surgered
from graph_surgery.sizes import fold_sizes
from graph_surgery.survey import Survey
from graph_surgery.tail import DetectionTail


def read_tail(model: onnx.ModelProto) -> tuple[DetectionTail, bool]:
    """Read the detection tail of a model, and whether it is an NMS_OPT_TRT node already.

    Raises
    ------
    SurgeryError
        When there is no tail that the surgery understands.
    """
    model = fold_sizes(model)
    graph = import_graph(model)
    node = find_nms_node(graph)
    if node is None:
        return find_tail(graph, model), False
    return read_surgered(graph, node), True


def tables(known: Survey) -> Group:
    """Format what is known of a model for a terminal."""
    shown = [_facts(known)]
    if known.heads:
        shown.append(_heads(known.heads))
        if known.priors is not None:
            shown.append(_priors(known.heads, known.priors))
    if known.tail:
        shown.append(_attributes(known.tail, known.surgered))
    return Group(*shown)


def _facts(known: Survey) -> Table:
    table = Table(show_header=False)
    table.add_column("what", overflow="fold")
    table.add_column("value", overflow="fold")
    for name, value in known.facts.items():
        table.add_row(escape(name), escape(value))
    return table


def _heads(heads: Heads) -> Table:
    batch = "dynamic" if heads.batch is None else f"fixed at {heads.batch}"
    table = Table(title=f"Heads: {heads.num_classes} classes, batch {batch}")
    for name in ("level", "grid, h x w", "anchors"):
        table.add_column(name, justify="right")
    for name in ("loc", "conf"):
        table.add_column(escape(f"{name} [channels]"), overflow="fold")
    for index, level in enumerate(heads.levels):
        table.add_row(
            str(index),
            f"{level.height} x {level.width}",
            str(level.anchors),
            escape(f"{level.loc} [{4 * level.anchors}]"),
            escape(f"{level.conf} [{heads.num_classes * level.anchors}]"),
        )
    return table


def _priors(heads: Heads, priors: NDArray[np.float32]) -> Table:
    table = Table(title=f"Priors: {heads.num_priors}, in fractions of the image")
    table.add_column("level", justify="right")
    table.add_column("priors", justify="right")
    table.add_column("sizes, w x h", overflow="fold")
    ltrb = priors[0].reshape(-1, 4)
    start = 0
    for index, level in enumerate(heads.levels):
        block = ltrb[start : start + level.priors].reshape(level.anchors, -1, 4)
        start += level.priors
        sizes = np.median(block[..., 2:] - block[..., :2], axis=1)
        text = [f"{width:.3f}x{height:.3f}" for width, height in sizes]
        table.add_row(str(index), str(level.priors), " ".join(text))
    return table


def _attributes(tail: DetectionTail, surgered: bool) -> Table:
    state = "in the graph" if surgered else "that the graph's postprocessing stands for"
    table = Table(title=f"{OP_TYPE} {state}")
    table.add_column("attribute", overflow="fold")
    table.add_column("value", overflow="fold")
    for name, value in asdict(tail.attributes).items():
        table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value))
    variances = np.unique(tail.priors[1].reshape(-1, 4), axis=0)
    table.add_row("variances", ", ".join(f"{value:g}" for value in variances[0]))
    table.add_row("outputs", escape(", ".join(tail.outputs)))
    if tail.capped_after_suppression:
        table.add_row("topK", "counted after suppression by the graph, before it by the operator")
    return table

"""What lies behind the heads of a detector, and what every reading of it needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, downstream, output_names, upstream, value
from graph_surgery.heads import HeadRunner, Heads
from graph_surgery.network import CHANNELS
from graph_surgery.nms_function import NmsAttributes
from graph_surgery.probe import FRACTIONS, OPERATOR_BOXES, Decoded
from graph_surgery.protobuf import inputs

BOUND_OF_ALL = frozenset({"Min", "Concat"})
BOUND_OF_FIRST = frozenset({"ReduceMin", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
"""Operators through which a constant upper bound, as in min(200, n), is followed."""


@dataclass(frozen=True)
class DetectionTail:
    """What lies behind the head convolutions of a detector.

    Attributes
    ----------
    heads
        The head convolutions' outputs.
    priors
        float32 [2, P * 4, 1]: ltrb and variances, as `nms_function` defines them.
    attributes
        Parameters of the tail.
    outputs
        Graph outputs that the tail makes.
    capped_after_suppression
        Whether the tail counts topK among the boxes that survive, not among those that enter
        suppression as NMS_OPT_TRT does: the same where no class has more candidates.
    image
        Width and height in pixels, where they are known.
    decoded
        Where and how the graph has its boxes: all of them before anything clips them, or, of a tail
        that cuts its levels, those that it suppresses.
    by_offset
        Whether the graph tells classes apart in suppression by an offset of their boxes, as
        batched_nms does, which rounds them.
    """

    heads: Heads
    priors: NDArray[np.float32]
    attributes: NmsAttributes
    outputs: tuple[str, ...]
    capped_after_suppression: bool
    image: tuple[int, int] | None = None
    decoded: Decoded = OPERATOR_BOXES
    by_offset: bool = False

    @property
    def pixels(self) -> bool:
        """Whether the graph decodes in pixels; the priors are in fractions of the image."""
        return self.decoded.unit != FRACTIONS


def tail_runner(
    graph: gs.Graph, model: onnx.ModelProto, ends: Sequence[gs.Tensor], heads: Heads
) -> HeadRunner:
    """All that is computed from the heads for boxes and scores."""
    names = [name for node in between(graph, ends, heads) for name in output_names(node)]
    return HeadRunner(model, heads, names)


def between(graph: gs.Graph, ends: Sequence[gs.Tensor], heads: Heads) -> list[gs.Node]:
    """Nodes behind the heads that boxes and scores depend on."""
    behind = {id(node) for node in downstream(graph, heads.names)}
    feeding = upstream(graph, ends, heads.names)
    return [node for node in feeding if id(node) in behind]


def image_size(model: onnx.ModelProto) -> tuple[int, int] | None:
    """Width and height of the one input [N, 3, H, W] or [N, H, W, 3], or grey; None without it."""
    found = []
    for given in inputs(model):
        sizes = [size.dim_value for size in given.type.tensor_type.shape.dim]
        if len(sizes) == 4 and CHANNELS.intersection((sizes[1], sizes[3])):
            height, width = sizes[2:] if sizes[1] in CHANNELS else sizes[1:3]
            found.append((width, height))
    return found[0] if len(found) == 1 and all(found[0]) else None


def top_ks(graph: gs.Graph, nodes: Iterable[gs.Node]) -> list[int]:
    """Constant bounds of the TopK among the nodes."""
    bounds = [upper_bound(graph, node.inputs[1]) for node in nodes if node.op == "TopK"]
    return [bound for bound in bounds if bound is not None]


def upper_bound(graph: gs.Graph, tensor: gs.Tensor) -> int | None:
    """The constant c of a tensor that is c, or min(c, something computed); None without one."""
    known = value(graph, tensor)
    if known is not None:
        return int(known.min()) if known.size and known.dtype.kind in "iuf" else None
    sources: Sequence[gs.Tensor] = []
    for node in tensor.inputs:
        if node.op in BOUND_OF_ALL:
            sources = node.inputs
        elif node.op in BOUND_OF_FIRST:
            sources = node.inputs[:1]
    bounds = [b for source in sources if (b := upper_bound(graph, source)) is not None]
    return min(bounds, default=None)


def threshold(graph: gs.Graph, nms: gs.Node, position: int) -> float:
    """One of the thresholds of NonMaxSuppression; 0 where it is left out, as ONNX has it."""
    if len(nms.inputs) <= position or nms.inputs[position].is_empty():
        return 0.0
    known = value(graph, nms.inputs[position])
    if known is None or known.size != 1 or known.dtype.kind not in "iuf":
        raise SurgeryError(f"input {position} of {describe(nms)} is not a constant number")
    return float(known.item())

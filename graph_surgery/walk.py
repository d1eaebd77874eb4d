"""From a graph's NonMaxSuppression back to its head convolutions, by structure alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, shape_of
from graph_surgery.heads import SHAPE_ONLY, Heads, Level

RESHAPING = frozenset(
    {"Reshape", "Transpose", "Identity", "Cast", "Flatten", "Squeeze", "Unsqueeze"}
)
"""Operators between a head convolution and the Concat of the levels: they keep every value."""


NMS = "NonMaxSuppression"

ALIKE = re.compile("nms|nonmax|detectionoutput", re.IGNORECASE)
"""Operators of engines and frameworks that suppress, by their names."""


def suppressions(graph: gs.Graph) -> list[gs.Node]:
    """Every node that suppresses boxes, also within If and Loop."""
    parts = [graph, *graph.subgraphs(recursive=True)]
    return [node for part in parts for node in part.nodes if ALIKE.search(node.op)]


def find_nms(graph: gs.Graph) -> gs.Node:
    """The one NonMaxSuppression; `import_graph` kept what the outputs depend on alone."""
    found = [node for node in graph.nodes if node.op == NMS]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(map(describe, found[:3])) + (", ..." if len(found) > 3 else "")
        raise SurgeryError(
            f"the outputs depend on {len(found)} NMS nodes, not on one: {names}; export with one "
            "NonMaxSuppression over the scores of all classes"
        )
    ends = ", ".join(
        f"{tensor.name!r} from {node.op}" for tensor in graph.outputs for node in tensor.inputs
    )
    nearest = "".join(
        f"; nearest is {describe(node)}, within If or Loop"
        if node.op == NMS
        else f"; nearest is {describe(node)}, which is no operator of ONNX"
        for node in suppressions(graph)[:1]
    )
    raise SurgeryError(
        f"no {NMS} upstream of the outputs ({ends}){nearest}: the detector must be exported with "
        f"its postprocessing, with one {NMS} over the scores of all classes"
    )


def find_convs(ends: Sequence[gs.Tensor]) -> list[gs.Node]:
    """The nearest convolutions upstream of some tensors."""
    convs: list[gs.Node] = []
    stack, seen = list(reversed(ends)), set()
    while stack:
        for node in stack.pop().inputs:
            if id(node) not in seen:
                seen.add(id(node))
                if node.op == "Conv":
                    convs.append(node)
                elif node.op not in SHAPE_ONLY:
                    stack.extend(node.inputs)
    return convs


def find_heads(ends: Sequence[gs.Tensor], what: str) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """Two groups of head convolutions' outputs, by the Concat that joins each.

    Parameters
    ----------
    ends
        Boxes and scores.
    what
        The node that reads them, for messages.
    """
    convs = find_convs(ends)
    if not convs:
        raise SurgeryError(f"no Conv upstream of {what}: export from the image on")
    if len(convs) == 2:  # of one level: there is nothing to join
        first, second = (conv.outputs[:1] for conv in convs)
        return first, second
    joins = list({id(join): join for join in map(_join_of, convs)}.values())
    if len(joins) != 2:
        names = ", ".join(map(describe, joins))
        raise SurgeryError(
            f"the {len(convs)} Conv upstream of {what} are joined by {names}; needed are "
            "two Concat, one of all loc heads and one of all conf heads: export with the levels "
            "joined before they are decoded"
        )
    first, second = (_heads_of(join) for join in joins)
    if len(first) != len(second):
        names = " and ".join(map(describe, joins))
        raise SurgeryError(f"{names} join {len(first)} and {len(second)} heads: one is missing")
    return first, second


def _join_of(conv: gs.Node) -> gs.Node:
    """The Concat to which a head convolution leads through reshaping operators alone."""
    node = conv
    while True:
        readers = [reader for reader in node.outputs[0].outputs if reader.op not in SHAPE_ONLY]
        kinds = sorted({reader.op for reader in readers})
        if kinds == ["Concat"] and all(reader is readers[0] for reader in readers):
            return _outermost(readers[0])
        if len(readers) != 1 or not RESHAPING.issuperset(kinds):
            raise SurgeryError(
                f"{describe(conv)} is upstream of NonMaxSuppression but is no head: its way to a "
                f"Concat of the levels meets {', '.join(kinds) or 'no reader'}, where only "
                f"{', '.join(sorted(RESHAPING))} may stand: export with all else behind the Concat"
            )
        node = readers[0]


def _outermost(join: gs.Node) -> gs.Node:
    """The last Concat, of heads alone, to which this one leads through Concats; itself if none."""
    readers = [reader for reader in join.outputs[0].outputs if reader.op not in SHAPE_ONLY]
    if len(readers) == 1 and readers[0].op == "Concat":
        try:
            _heads_of(readers[0])
        except SurgeryError:
            return join
        return _outermost(readers[0])
    return join


def _heads_of(join: gs.Node) -> list[gs.Tensor]:
    """The heads that a Concat, or Concats that it joins, put one after the other."""
    heads: list[gs.Tensor] = []
    for tensor in join.inputs:
        if [node.op for node in tensor.inputs] == ["Concat"]:
            heads += _heads_of(tensor.inputs[0])
        else:
            heads.append(_head_of(join, tensor))
    return heads


def _head_of(join: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    """The head convolution's output behind one input of the Concat `join`."""
    head = tensor
    while head.inputs:
        (node,) = head.inputs
        if node.op == "Conv":
            return head
        if node.op not in RESHAPING:
            break
        head = node.inputs[0]
    raise SurgeryError(
        f"input {tensor.name!r} of {describe(join)} does not come from a head Conv through "
        "reshaping alone"
    )


def read_either_way(first: Sequence[gs.Tensor], second: Sequence[gs.Tensor]) -> list[Heads]:
    """Read one of two lists of head tensors as loc and the other as conf.

    Two readings where the channels fit both ways round.

    Raises
    ------
    SurgeryError
        When they fit neither way.
    """
    paired, errors = [], []
    for loc, conf in ((first, second), (second, first)):
        try:
            paired.append(read_heads(loc, conf))
        except SurgeryError as error:
            errors.append(error)
    if not paired:
        raise errors[0]
    return paired


def read_heads(loc: Sequence[gs.Tensor], conf: Sequence[gs.Tensor]) -> Heads:
    """Pair the head tensors of each level.

    Raises
    ------
    SurgeryError
        When shapes are not static, differ within a pair, or give no common number of classes.
    """
    levels: list[Level] = []
    classes: set[int] = set()
    batches: set[int | None] = set()
    for pair in zip(loc, conf, strict=True):
        for tensor in pair:
            shape = shape_of(tensor)
            if len(shape) != 4 or None in shape[1:]:
                raise SurgeryError(
                    f"head tensor {tensor.name!r} has shape {shape}, needed is [N, C, h, w] with "
                    "static C, h and w: export with a fixed image size"
                )
            batches.add(shape[0])
        (_, channels, height, width), (_, conf_channels, *grid) = (one.shape for one in pair)
        anchors = channels // 4
        if grid != [height, width] or channels % 4 or not anchors or conf_channels % anchors:
            text = " and ".join(f"{one.name!r} {shape_of(one)}" for one in pair)
            raise SurgeryError(
                f"head tensors {text} are no pair of [N, A * 4, h, w] and [N, A * C, h, w]"
            )
        levels.append(Level(pair[0].name, pair[1].name, anchors, height, width))
        classes.add(conf_channels // anchors)
    if len(classes) != 1:
        raise SurgeryError(f"the levels differ in their number of classes: {sorted(classes)}")
    batch = batches.pop() if len(batches) == 1 else None
    return Heads(tuple(levels), classes.pop(), batch)

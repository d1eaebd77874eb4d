"""Finding the detection tail of a graph: by structure and by experiment, never by names.

The graph is walked back from its one NonMaxSuppression to the convolutions that feed it. What
lies between is not matched node by node but probed (`probe`): the same tail may be written in
many ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, downstream, output_names, shape_of, upstream, value
from graph_surgery.heads import SHAPE_ONLY, HeadRunner, Heads, Level
from graph_surgery.nms_function import DOMAIN, OP_TYPE, NmsAttributes
from graph_surgery.probe import probe_boxes, probe_scores
from graph_surgery.protobuf import inputs

RESHAPING = frozenset(
    {"Reshape", "Transpose", "Identity", "Cast", "Flatten", "Squeeze", "Unsqueeze"}
)
"""Operators between a head convolution and the Concat of the levels: they keep every value."""

BOUND_OF_ALL = frozenset({"Min", "Concat"})
BOUND_OF_FIRST = frozenset({"ReduceMin", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
"""Operators through which a constant upper bound, as in min(200, n), is followed."""

CHANNELS = frozenset({1, 3})
"""Of an image."""

ATTRIBUTE_TYPES = {"int": int, "float": float, "tuple[int, int, int]": list}
"""How graphsurgeon gives the value of an attribute, by the annotation in `NmsAttributes`."""


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
    pixels
        Whether the tail decodes in pixels; the priors are in fractions of the image.
    """

    heads: Heads
    priors: NDArray[np.float32]
    attributes: NmsAttributes
    outputs: tuple[str, ...]
    capped_after_suppression: bool
    image: tuple[int, int] | None = None
    pixels: bool = False


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


def find_nms_node(graph: gs.Graph) -> gs.Node | None:
    """Return the NMS_OPT_TRT node of a graph that had its surgery, else None."""
    kind = (DOMAIN, OP_TYPE)
    return next((node for node in graph.nodes if (node.domain, node.op) == kind), None)


def read_surgered(graph: gs.Graph, node: gs.Node) -> DetectionTail:
    """Read the tail of a graph that has an NMS_OPT_TRT node.

    Raises
    ------
    SurgeryError
        When the node is not written as `nms_function.add_nms` writes it.
    """
    values = dict(node.attrs)
    names = {field.name: ATTRIBUTE_TYPES[str(field.type)] for field in fields(NmsAttributes)}
    wrong = [name for name, kind in names.items() if not isinstance(values.get(name), kind)]
    if wrong:
        raise SurgeryError(
            f"{OP_TYPE} lacks these attributes, or has them of another type: {', '.join(wrong)}"
        )
    values["inputOrder"] = tuple(values["inputOrder"])
    attributes = NmsAttributes(**{name: values[name] for name in names})
    levels = attributes.numLayers
    *tensors, last = node.inputs
    priors = value(graph, last) if len(tensors) == 2 * levels else None
    if priors is None:
        raise SurgeryError(
            f"{OP_TYPE} with numLayers={levels} takes {2 * levels} head tensors and constant priors"
        )
    heads = read_heads(tensors[:levels], tensors[levels:])
    given = (attributes.numClasses, priors.dtype, priors.shape)
    if given != (heads.num_classes, np.dtype(np.float32), (2, heads.num_priors * 4, 1)):
        raise SurgeryError(
            f"{OP_TYPE} has numClasses={attributes.numClasses} and priors {priors.dtype}"
            f"{list(priors.shape)}; its heads are of {heads.num_classes} classes and "
            f"{heads.num_priors} priors, float32[2, {heads.num_priors * 4}, 1]"
        )
    return DetectionTail(heads, priors, attributes, tuple(output_names(node)), False)


def find_tail(graph: gs.Graph, model: onnx.ModelProto) -> DetectionTail:
    """Find the tail that NMS_OPT_TRT can replace.

    Parameters
    ----------
    model
        What the graph was imported from; parts of it are run.

    Raises
    ------
    SurgeryError
        When there is none, or more than one: what was looked for and what is missing.
    """
    nms = _find_nms(graph)
    first, second = _find_heads(nms)
    paired, errors = [], []
    for loc, conf in ((first, second), (second, first)):
        try:
            paired.append(read_heads(loc, conf))
        except SurgeryError as error:
            errors.append(error)
    if paired:
        errors = []
    for heads in paired:  # two where the channels fit both ways round
        try:
            return _read_tail(graph, model, nms, heads)
        except SurgeryError as error:
            errors.append(error)
    raise errors[0]


def _find_nms(graph: gs.Graph) -> gs.Node:
    """The one NonMaxSuppression; `import_graph` kept what the outputs depend on alone."""
    found = [node for node in graph.nodes if node.op == "NonMaxSuppression"]
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
    raise SurgeryError(
        f"no NonMaxSuppression upstream of the outputs ({ends}): the detector must be exported "
        "with its postprocessing"
    )


def _find_heads(nms: gs.Node) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """Two groups of head convolutions' outputs, by the Concat that joins each."""
    convs: list[gs.Node] = []
    stack, seen = list(reversed(nms.inputs[:2])), set()
    while stack:
        for node in stack.pop().inputs:
            if id(node) not in seen:
                seen.add(id(node))
                if node.op == "Conv":
                    convs.append(node)
                elif node.op not in SHAPE_ONLY:
                    stack.extend(node.inputs)
    if not convs:
        raise SurgeryError(f"no Conv upstream of {describe(nms)}: export from the image on")
    if len(convs) == 2:  # of one level: there is nothing to join
        first, second = (conv.outputs[:1] for conv in convs)
        return first, second
    joins = list({id(join): join for join in map(_join_of, convs)}.values())
    if len(joins) != 2:
        names = ", ".join(map(describe, joins))
        raise SurgeryError(
            f"the {len(convs)} Conv upstream of {describe(nms)} are joined by {names}; needed are "
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


def _read_tail(
    graph: gs.Graph, model: onnx.ModelProto, nms: gs.Node, heads: Heads
) -> DetectionTail:
    """Probe the tail behind the heads and read its parameters."""
    behind = {id(node) for node in downstream(graph, heads.names)}
    feeding = upstream(graph, nms.inputs[:2], heads.names)
    before = [node for node in feeding if id(node) in behind]
    run = HeadRunner(model, heads, [name for node in before for name in output_names(node)])
    _check_classes(nms, heads, run)
    image = _image_size(model)
    priors, pixels = probe_boxes(run, heads, image)
    background = probe_scores(run, heads)

    after = downstream(graph, output_names(nms))
    made = {name for node in after for name in output_names(node)}
    top_k, capped_after = _candidates(graph, nms, _top_ks(graph, before))
    keep = _top_ks(graph, after)
    if not keep:
        raise SurgeryError(
            f"no TopK with a constant bound between {describe(nms)} and the outputs: how many "
            "detections an image keeps is not known"
        )
    levels = len(heads.levels)
    attributes = NmsAttributes(
        numClasses=heads.num_classes,
        topK=top_k,
        keepTopK=keep[-1],
        confidenceThreshold=_scalar(graph, nms, 4),
        nmsThreshold=_scalar(graph, nms, 3),
        backgroundLabelId=background,
        numLayers=levels,
        inputOrder=(0, levels, 2 * levels),
    )
    return DetectionTail(
        heads,
        priors,
        attributes,
        tuple(tensor.name for tensor in graph.outputs if tensor.name in made),
        capped_after and top_k < heads.num_priors,
        image,
        pixels,
    )


def _image_size(model: onnx.ModelProto) -> tuple[int, int] | None:
    """Width and height of the one input [N, 3, H, W] or [N, H, W, 3], or grey; None without it."""
    found = []
    for given in inputs(model):
        sizes = [size.dim_value for size in given.type.tensor_type.shape.dim]
        if len(sizes) == 4 and CHANNELS.intersection((sizes[1], sizes[3])):
            height, width = sizes[2:] if sizes[1] in CHANNELS else sizes[1:3]
            found.append((width, height))
    return found[0] if len(found) == 1 and all(found[0]) else None


def _check_classes(nms: gs.Node, heads: Heads, run: HeadRunner) -> None:
    """Refuse one class of boxes that stands for several."""
    batch, classes, priors = heads.batch or 1, heads.num_classes, heads.num_priors
    loc, conf = (np.zeros((batch, rows, priors), np.float32) for rows in (4, classes))
    scores = run(loc, conf).get(nms.inputs[1].name)
    if scores is None or scores.shape[:-1] != (batch, 1) or classes <= 2:
        return
    what = "takes every box as of its best class, and lets classes suppress one another"
    if scores.shape[-1] != priors:
        what = (
            f"takes {scores.shape[-1]} boxes as of one class, told apart by an offset of their "
            "coordinates as batched_nms writes it, which rounds them"
        )
    raise SurgeryError(
        f"{describe(nms)} {what}; {OP_TYPE} suppresses within each class: export with "
        f"NonMaxSuppression over boxes [N, {priors}, 4] and scores [N, {classes - 1} or {classes}, "
        f"{priors}]"
    )


def _candidates(graph: gs.Graph, nms: gs.Node, before: list[int]) -> tuple[int, bool]:
    """topK, and whether it caps the classes after suppression."""
    cap = _upper_bound(graph, nms.inputs[2]) if len(nms.inputs) > 2 else 0
    if len(before) > 1:
        raise SurgeryError(
            f"{len(before)} TopK stand between the heads and {describe(nms)}: at most one, the "
            "candidates of each class, is understood"
        )
    if before:
        if cap is not None and cap < before[0]:
            raise SurgeryError(
                f"{describe(nms)} keeps {cap} of the {before[0]} candidates of a class; {OP_TYPE} "
                "keeps all that survive"
            )
        return before[0], False
    if not cap:
        raise SurgeryError(
            f"neither a TopK with a constant bound before {describe(nms)} nor its "
            "max_output_boxes_per_class tells how many candidates of a class count"
        )
    return cap, True


def _top_ks(graph: gs.Graph, nodes: Iterable[gs.Node]) -> list[int]:
    """Constant bounds of the TopK among the nodes."""
    bounds = [_upper_bound(graph, node.inputs[1]) for node in nodes if node.op == "TopK"]
    return [bound for bound in bounds if bound is not None]


def _upper_bound(graph: gs.Graph, tensor: gs.Tensor) -> int | None:
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
    bounds = [b for source in sources if (b := _upper_bound(graph, source)) is not None]
    return min(bounds, default=None)


def _scalar(graph: gs.Graph, nms: gs.Node, position: int) -> float:
    """One of the thresholds of NonMaxSuppression; 0 where it is left out, as ONNX has it."""
    if len(nms.inputs) <= position or nms.inputs[position].is_empty():
        return 0.0
    known = value(graph, nms.inputs[position])
    if known is None or known.size != 1 or known.dtype.kind not in "iuf":
        raise SurgeryError(f"input {position} of {describe(nms)} is not a constant number")
    return float(known.item())

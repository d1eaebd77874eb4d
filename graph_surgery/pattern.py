"""Finding the detection tail of a graph: by structure and by experiment, never by names.

The graph is walked back from its one NonMaxSuppression to the convolutions that feed it. What
lies between is not matched node by node but probed (`probe`): the same tail may be written in
many ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, downstream, output_names, upstream, value
from graph_surgery.heads import HeadRunner, Heads
from graph_surgery.network import CHANNELS
from graph_surgery.nms_function import DOMAIN, OP_TYPE, OURS, VERSIONS, NmsAttributes
from graph_surgery.probe import FRACTIONS, OPERATOR_BOXES, Decoded, probe_boxes, probe_scores
from graph_surgery.protobuf import inputs
from graph_surgery.walk import find_heads, find_nms, read_heads

BOUND_OF_ALL = frozenset({"Min", "Concat"})
BOUND_OF_FIRST = frozenset({"ReduceMin", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
"""Operators through which a constant upper bound, as in min(200, n), is followed."""

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
    decoded
        Where and how the graph has its boxes before anything clips them.
    """

    heads: Heads
    priors: NDArray[np.float32]
    attributes: NmsAttributes
    outputs: tuple[str, ...]
    capped_after_suppression: bool
    image: tuple[int, int] | None = None
    decoded: Decoded = OPERATOR_BOXES

    @property
    def pixels(self) -> bool:
        """Whether the graph decodes in pixels; the priors are in fractions of the image."""
        return self.decoded.unit != FRACTIONS


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
    version = values.get("plugin_version", VERSIONS[0])
    if version not in VERSIONS:
        raise SurgeryError(
            f"{OP_TYPE} has plugin_version={str(version)[:20]!r}; known are "
            f"{' and '.join(map(repr, VERSIONS))}"
        )
    names = {field.name: ATTRIBUTE_TYPES[str(field.type)] for field in fields(NmsAttributes)}
    if version == VERSIONS[0]:
        names = {name: kind for name, kind in names.items() if name not in OURS}
    wrong = [name for name, kind in names.items() if not isinstance(values.get(name), kind)]
    if wrong:
        raise SurgeryError(
            f"{OP_TYPE} lacks these attributes, or has them of another type: {', '.join(wrong)}"
        )
    values["inputOrder"] = tuple(values["inputOrder"])
    attributes = NmsAttributes(**{name: values[name] for name in names})
    if str(attributes.version) != version:
        raise SurgeryError(
            f"{OP_TYPE} has plugin_version={version!r}, and {', '.join(OURS)} of none but their "
            f"defaults: that is version {VERSIONS[0]!r}, without them"
        )
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
    nms = find_nms(graph)
    errors = []
    for heads in pair_heads(nms.inputs[:2], describe(nms)):
        try:
            return _read_tail(graph, model, nms, heads)
        except SurgeryError as error:
            errors.append(error)
    raise errors[0]


def pair_heads(ends: Sequence[gs.Tensor], what: str) -> list[Heads]:
    """The heads of which boxes and scores are made, as `find_heads` finds them.

    Two readings where the channels fit both ways round.
    """
    first, second = find_heads(ends, what)
    paired, errors = [], []
    for loc, conf in ((first, second), (second, first)):
        try:
            paired.append(read_heads(loc, conf))
        except SurgeryError as error:
            errors.append(error)
    if not paired:
        raise errors[0]
    return paired


def _read_tail(
    graph: gs.Graph, model: onnx.ModelProto, nms: gs.Node, heads: Heads
) -> DetectionTail:
    """Probe the tail behind the heads and read its parameters."""
    run = tail_runner(graph, model, nms.inputs[:2], heads)
    check_classes(nms, heads, run)
    image = image_size(model)
    priors, decoded = probe_boxes(run, heads, image)
    heads = replace(heads, layout=decoded.layout)
    background, sigmoid = probe_scores(run, heads)
    attributes, capped = read_parameters(graph, nms, heads, background, sigmoid=sigmoid)
    made = {name for node in downstream(graph, output_names(nms)) for name in output_names(node)}
    outputs = tuple(tensor.name for tensor in graph.outputs if tensor.name in made)
    return DetectionTail(heads, priors, attributes, outputs, capped, image, decoded)


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


def read_parameters(
    graph: gs.Graph, nms: gs.Node, heads: Heads, background: int, *, sigmoid: bool
) -> tuple[NmsAttributes, bool]:
    """Parameters of the tail, and whether it counts topK after suppression."""
    before = between(graph, nms.inputs[:2], heads)
    top_k, capped_after = _candidates(graph, nms, _top_ks(graph, before))
    keep = _top_ks(graph, downstream(graph, output_names(nms)))
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
        confidenceThreshold=threshold(graph, nms, 4),
        nmsThreshold=threshold(graph, nms, 3),
        backgroundLabelId=background,
        numLayers=levels,
        inputOrder=(0, levels, 2 * levels),
        confSigmoid=int(sigmoid),
        confSoftmax=int(not sigmoid),
    )
    return attributes, capped_after and top_k < heads.num_priors


def image_size(model: onnx.ModelProto) -> tuple[int, int] | None:
    """Width and height of the one input [N, 3, H, W] or [N, H, W, 3], or grey; None without it."""
    found = []
    for given in inputs(model):
        sizes = [size.dim_value for size in given.type.tensor_type.shape.dim]
        if len(sizes) == 4 and CHANNELS.intersection((sizes[1], sizes[3])):
            height, width = sizes[2:] if sizes[1] in CHANNELS else sizes[1:3]
            found.append((width, height))
    return found[0] if len(found) == 1 and all(found[0]) else None


def check_classes(nms: gs.Node, heads: Heads, run: HeadRunner) -> None:
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


def threshold(graph: gs.Graph, nms: gs.Node, position: int) -> float:
    """One of the thresholds of NonMaxSuppression; 0 where it is left out, as ONNX has it."""
    if len(nms.inputs) <= position or nms.inputs[position].is_empty():
        return 0.0
    known = value(graph, nms.inputs[position])
    if known is None or known.size != 1 or known.dtype.kind not in "iuf":
        raise SurgeryError(f"input {position} of {describe(nms)} is not a constant number")
    return float(known.item())

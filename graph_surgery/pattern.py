"""Finding the detection tail of a graph: by structure and by experiment, never by names.

The graph is walked back from its one NonMaxSuppression to the convolutions that feed it. What
lies between is not matched node by node but probed (`probe`): the same tail may be written in
many ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, downstream, output_names, value
from graph_surgery.heads import HeadRunner, Heads
from graph_surgery.levels import find_cut, read_cut
from graph_surgery.nms_function import DOMAIN, OP_TYPE, OURS, VERSIONS, NmsAttributes
from graph_surgery.probe import probe_boxes, probe_scores
from graph_surgery.tail import (
    DetectionTail,
    between,
    image_size,
    tail_runner,
    threshold,
    top_ks,
    upper_bound,
)
from graph_surgery.walk import find_heads, find_nms, read_either_way, read_heads

ATTRIBUTE_TYPES = {"int": int, "float": float, "tuple[int, int, int]": list}
"""How graphsurgeon gives the value of an attribute, by the annotation in `NmsAttributes`."""


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
    if (cut := find_cut(graph)) is not None:
        return read_cut(graph, model, cut)
    nms = find_nms(graph)
    errors = []
    for heads in pair_heads(nms.inputs[:2], describe(nms)):
        try:
            return _read_tail(graph, model, nms, heads)
        except SurgeryError as error:
            errors.append(error)
    raise errors[0]


def pair_heads(ends: Sequence[gs.Tensor], what: str) -> list[Heads]:
    """The heads of which boxes and scores are made, as `find_heads` finds them."""
    return read_either_way(*find_heads(ends, what))


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


def read_parameters(
    graph: gs.Graph, nms: gs.Node, heads: Heads, background: int, *, sigmoid: bool
) -> tuple[NmsAttributes, bool]:
    """Parameters of the tail, and whether it counts topK after suppression."""
    before = between(graph, nms.inputs[:2], heads)
    top_k, capped_after = _candidates(graph, nms, top_ks(graph, before))
    keep = top_ks(graph, downstream(graph, output_names(nms)))
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
    cap = upper_bound(graph, nms.inputs[2]) if len(nms.inputs) > 2 else 0
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

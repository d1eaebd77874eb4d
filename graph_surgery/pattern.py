"""Finding the detection tail of a graph: by structure and by experiment, never by names.

The graph is walked back from its one NonMaxSuppression to the convolutions that feed it. What
lies between is not matched node by node but probed (`probe`): the same tail may be written in
many ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import onnx
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.heads import SHAPE_ONLY, HeadRunner, Heads, read_heads
from graph_surgery.nms_function import DOMAIN, OP_TYPE, NmsAttributes
from graph_surgery.probe import probe_boxes, probe_scores
from graph_surgery.topology import Topology

RESHAPING = frozenset(
    {"Reshape", "Transpose", "Identity", "Cast", "Flatten", "Squeeze", "Unsqueeze"}
)
"""Operators between a head convolution and the Concat of the levels: they keep every value."""

BOUND_OF_ALL = frozenset({"Min", "Concat"})
BOUND_OF_FIRST = frozenset({"ReduceMin", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
"""Operators through which a constant upper bound, as in min(200, n), is followed."""

ATTRIBUTE_TYPES = {"int": int, "float": float, "tuple[int, int, int]": list}
"""How onnx gives the value of an attribute, by the annotation in `NmsAttributes`."""


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
    """

    heads: Heads
    priors: NDArray[np.float32]
    attributes: NmsAttributes
    outputs: tuple[str, ...]
    capped_after_suppression: bool


def find_nms_node(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """Return the NMS_OPT_TRT node of a graph that had its surgery, else None."""
    kind = (DOMAIN, OP_TYPE)
    return next((node for node in model.graph.node if (node.domain, node.op_type) == kind), None)


def read_surgered(topology: Topology, node: onnx.NodeProto) -> DetectionTail:
    """Read the tail of a graph that has an NMS_OPT_TRT node.

    Raises
    ------
    SurgeryError
        When the node is not written as `nms_function.nms_node` writes it.
    """
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    names = {field.name: ATTRIBUTE_TYPES[str(field.type)] for field in fields(NmsAttributes)}
    wrong = [name for name, kind in names.items() if not isinstance(values.get(name), kind)]
    if wrong:
        raise SurgeryError(
            f"{OP_TYPE} lacks these attributes, or has them of another type: {', '.join(wrong)}"
        )
    values["inputOrder"] = tuple(values["inputOrder"])
    attributes = NmsAttributes(**{name: values[name] for name in names})
    levels = attributes.numLayers
    priors = topology.value(node.input[-1]) if len(node.input) == 2 * levels + 1 else None
    if priors is None:
        raise SurgeryError(
            f"{OP_TYPE} with numLayers={levels} takes {2 * levels} head tensors and constant priors"
        )
    heads = read_heads(topology, node.input[:levels], node.input[levels:-1])
    given = (attributes.numClasses, priors.dtype, priors.shape)
    if given != (heads.num_classes, np.dtype(np.float32), (2, heads.num_priors * 4, 1)):
        raise SurgeryError(
            f"{OP_TYPE} has numClasses={attributes.numClasses} and priors {priors.dtype}"
            f"{list(priors.shape)}; its heads are of {heads.num_classes} classes and "
            f"{heads.num_priors} priors, float32[2, {heads.num_priors * 4}, 1]"
        )
    return DetectionTail(heads, priors, attributes, tuple(node.output), False)


def find_tail(topology: Topology) -> DetectionTail:
    """Find the tail that NMS_OPT_TRT can replace.

    Raises
    ------
    SurgeryError
        When there is none, or more than one: what was looked for and what is missing.
    """
    nms = _find_nms(topology)
    first, second = _find_heads(topology, nms)
    paired, errors = [], []
    for loc, conf in ((first, second), (second, first)):
        try:
            paired.append(read_heads(topology, loc, conf))
        except SurgeryError as error:
            errors.append(error)
    if paired:
        errors = []
    for heads in paired:  # two where the channels fit both ways round
        try:
            return _read_tail(topology, nms, heads)
        except SurgeryError as error:
            errors.append(error)
    raise errors[0]


def _find_nms(topology: Topology) -> int:
    """The one NonMaxSuppression on which the outputs depend."""
    outputs = [output.name for output in topology.model.graph.output]
    nodes = topology.upstream(outputs)
    found = [index for index in nodes if topology.nodes[index].op_type == "NonMaxSuppression"]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(topology.describe(index) for index in found)
        raise SurgeryError(f"the outputs depend on {len(found)} NMS nodes, not on one: {names}")
    ends = ", ".join(
        f"{name!r} from {topology.nodes[topology.producer[name]].op_type}"
        for name in outputs
        if name in topology.producer
    )
    raise SurgeryError(
        f"no NonMaxSuppression upstream of the outputs ({ends}): the detector must be exported "
        "with its postprocessing"
    )


def _find_heads(topology: Topology, nms: int) -> tuple[list[str], list[str]]:
    """Two groups of head convolutions' outputs, by the Concat that joins each."""
    convs: dict[int, None] = {}
    stack, seen = list(reversed(topology.nodes[nms].input[:2])), set()
    while stack:
        index = topology.producer.get(stack.pop())
        if index is None or index in seen:
            continue
        seen.add(index)
        node = topology.nodes[index]
        if node.op_type == "Conv":
            convs[index] = None
        elif node.op_type not in SHAPE_ONLY:
            stack.extend(node.input)
    if not convs:
        raise SurgeryError(f"no Conv upstream of {topology.describe(nms)}")
    joins = dict.fromkeys(_join_of(topology, conv) for conv in convs)
    if len(joins) != 2:
        names = ", ".join(topology.describe(join) for join in joins)
        raise SurgeryError(
            f"the {len(convs)} Conv upstream of {topology.describe(nms)} are joined by {names}; "
            "needed are two Concat, one of all loc heads and one of all conf heads"
        )
    first, second = (
        [_head_of(topology, join, x) for x in topology.nodes[join].input] for join in joins
    )
    if len(first) != len(second):
        names = " and ".join(topology.describe(join) for join in joins)
        raise SurgeryError(f"{names} join {len(first)} and {len(second)} heads: one is missing")
    return first, second


def _join_of(topology: Topology, conv: int) -> int:
    """The Concat to which a head convolution leads through reshaping operators alone."""
    index = conv
    while True:
        readers = [
            reader
            for reader in topology.consumers.get(topology.nodes[index].output[0], [])
            if topology.nodes[reader].op_type not in SHAPE_ONLY
        ]
        kinds = sorted({topology.nodes[reader].op_type for reader in readers})
        if kinds == ["Concat"] and len(set(readers)) == 1:
            return readers[0]
        if len(readers) != 1 or not RESHAPING.issuperset(kinds):
            raise SurgeryError(
                f"{topology.describe(conv)} is upstream of NonMaxSuppression but is no head: its "
                f"way to a Concat of the levels meets {', '.join(kinds) or 'no reader'}, where "
                f"only {', '.join(sorted(RESHAPING))} may stand"
            )
        index = readers[0]


def _head_of(topology: Topology, join: int, name: str) -> str:
    """The head convolution's output behind one input of the Concat `join`."""
    tensor = name
    while (index := topology.producer.get(tensor)) is not None:
        node = topology.nodes[index]
        if node.op_type == "Conv":
            return tensor
        if node.op_type not in RESHAPING:
            break
        tensor = node.input[0]
    raise SurgeryError(
        f"input {name!r} of {topology.describe(join)} does not come from a head Conv through "
        "reshaping alone"
    )


def _read_tail(topology: Topology, nms: int, heads: Heads) -> DetectionTail:
    """Probe the tail behind the heads and read its parameters."""
    node = topology.nodes[nms]
    behind = set(topology.downstream(heads.names))
    before = sorted(behind.intersection(topology.upstream(node.input[:2], heads.names)))
    run = HeadRunner(
        topology, heads, [name for index in before for name in topology.nodes[index].output if name]
    )
    priors = probe_boxes(run, heads)
    background = probe_scores(run, heads)

    after = topology.downstream(node.output)
    made = {name for index in after for name in topology.nodes[index].output}
    outputs = [output.name for output in topology.model.graph.output]
    needed = set(topology.upstream(outputs))
    top_k, capped_after = _candidates(topology, nms, _top_ks(topology, before))
    keep = _top_ks(topology, [index for index in after if index in needed])
    if not keep:
        raise SurgeryError(
            f"no TopK with a constant bound between {topology.describe(nms)} and the outputs: how "
            "many detections an image keeps is not known"
        )
    levels = len(heads.levels)
    attributes = NmsAttributes(
        numClasses=heads.num_classes,
        topK=top_k,
        keepTopK=keep[-1],
        confidenceThreshold=_scalar(topology, nms, 4),
        nmsThreshold=_scalar(topology, nms, 3),
        backgroundLabelId=background,
        numLayers=levels,
        inputOrder=(0, levels, 2 * levels),
    )
    return DetectionTail(
        heads,
        priors,
        attributes,
        tuple(name for name in outputs if name in made),
        capped_after and top_k < heads.num_priors,
    )


def _candidates(topology: Topology, nms: int, before: list[int]) -> tuple[int, bool]:
    """topK, and whether it caps the classes after suppression."""
    node = topology.nodes[nms]
    cap = _upper_bound(topology, node.input[2]) if len(node.input) > 2 else 0
    if len(before) > 1:
        raise SurgeryError(
            f"{len(before)} TopK stand between the heads and {topology.describe(nms)}: at most "
            "one, the candidates of each class, is understood"
        )
    if before:
        if cap is not None and cap < before[0]:
            raise SurgeryError(
                f"{topology.describe(nms)} keeps {cap} of the {before[0]} candidates of a class; "
                f"{OP_TYPE} keeps all that survive"
            )
        return before[0], False
    if not cap:
        raise SurgeryError(
            f"neither a TopK with a constant bound before {topology.describe(nms)} nor its "
            "max_output_boxes_per_class tells how many candidates of a class count"
        )
    return cap, True


def _top_ks(topology: Topology, nodes: Sequence[int]) -> list[int]:
    """Constant bounds of the TopK among the nodes."""
    top = [topology.nodes[index] for index in nodes if topology.nodes[index].op_type == "TopK"]
    bounds = [_upper_bound(topology, node.input[1]) for node in top]
    return [bound for bound in bounds if bound is not None]


def _upper_bound(topology: Topology, name: str) -> int | None:
    """The constant c of a tensor that is c, or min(c, something computed); None without one."""
    value = topology.value(name)
    if value is not None:
        return int(value.min())
    index = topology.producer.get(name)
    if index is None:
        return None
    node = topology.nodes[index]
    if node.op_type in BOUND_OF_ALL:
        sources = list(node.input)
    else:
        sources = list(node.input[:1]) if node.op_type in BOUND_OF_FIRST else []
    bounds = [bound for source in sources if (bound := _upper_bound(topology, source)) is not None]
    return min(bounds, default=None)


def _scalar(topology: Topology, nms: int, position: int) -> float:
    """One of the thresholds of NonMaxSuppression; 0 where it is left out, as ONNX has it."""
    node = topology.nodes[nms]
    name = node.input[position] if len(node.input) > position else ""
    if not name:
        return 0.0
    value = topology.value(name)
    if value is None or value.size != 1:
        raise SurgeryError(f"input {position} of {topology.describe(nms)} is not a constant number")
    return float(value.item())

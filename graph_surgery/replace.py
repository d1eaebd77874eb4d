"""The surgery: the tail of a detector out, one NMS_OPT_TRT node in."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from graph_surgery.errors import SurgeryError
from graph_surgery.network import BATCH_NORM, fold_batch_norms, free_batch
from graph_surgery.nms_function import (
    DOMAIN,
    DOMAIN_VERSION,
    MIN_IR_VERSION,
    MIN_OPSET,
    OP_TYPE,
    nms_function,
    nms_node,
)
from graph_surgery.pattern import DetectionTail, find_nms_node, find_tail, read_surgered
from graph_surgery.topology import Topology, one_line
from graph_surgery.verify import verify_network, verify_tail

PRIORS = "nms_priors"
"""Name of the initialiser that holds the priors."""


@dataclass(frozen=True)
class SurgeryResult:
    """What became of a model.

    Attributes
    ----------
    model
        The new model; the one given where nothing was to do.
    modified
        Whether it is a new one.
    changes
        What was done and how it was proved, a sentence each.
    """

    model: onnx.ModelProto
    modified: bool
    changes: tuple[str, ...]


def insert_nms(model: onnx.ModelProto) -> SurgeryResult:
    """Replace everything behind the head convolutions by one NMS_OPT_TRT node.

    The outputs of the tail become ``detections`` float32 [N, keepTopK, 7] and
    ``num_detections`` int32 [N]; other outputs stay. Old and new tail are run on the same head
    tensors and must agree. In front of the heads, batch norms are folded into their convolutions,
    a model older than opset 18 is converted to it, and a fixed batch becomes dynamic, unless the
    network computes with it; old and new network are run on the same images and must agree, too.

    Parameters
    ----------
    model
        A valid ONNX model, with its weights. It is not changed.

    Raises
    ------
    SurgeryError
        When no tail, or not one that the operator can express, is found, or the proof fails;
        when the model has an NMS_OPT_TRT node that is not as this function makes it.
    """
    if (node := find_nms_node(model)) is not None:
        _check_surgered(model, node)
        return SurgeryResult(model, False, (f"the graph has its {OP_TYPE} node: nothing to do",))
    old = Topology(model)
    tail = find_tail(old)
    new_model, network_changes = _adapt_network(old, _replace(old, tail), tail)
    try:
        onnx.checker.check_model(new_model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SurgeryError(f"the new graph is invalid: {one_line(error)}") from error
    agreement = verify_tail(old, Topology(new_model), tail)

    folded = _batch_norms(model) - _batch_norms(new_model)
    replaced = len(model.graph.node) - folded - len(new_model.graph.node) + 1
    changes = [
        f"{replaced} nodes behind {len(tail.heads.names)} head convolutions became one {OP_TYPE}",
        f"outputs {', '.join(tail.outputs)} (boxes {agreement.box_order}) became detections "
        "(ymin, xmin, ymax, xmax, clipped to the image) and num_detections",
    ]
    if tail.capped_after_suppression:
        top_k = tail.attributes.topK
        changes.append(
            f"the graph kept {top_k} boxes of a class after suppression, {OP_TYPE} takes the "
            f"{top_k} best before it: the same where no class has more than {top_k} candidates"
        )
    changes += network_changes
    changes.append(
        f"proved in ONNX Runtime on random head tensors: {agreement.images} images, "
        f"{agreement.detections} detections, the same rows within {agreement.difference:.1e}"
    )
    return SurgeryResult(new_model, True, tuple(changes))


def _adapt_network(
    old: Topology, new: onnx.ModelProto, tail: DetectionTail
) -> tuple[onnx.ModelProto, list[str]]:
    """Make the batch of the new model dynamic, prove its network, and say what changed in it."""
    changes = []
    if folded := _batch_norms(old.model) - _batch_norms(new):
        changes.append(f"{folded} batch norms were folded into their convolutions")
    if (opset := _opset(old.model)) < MIN_OPSET:
        changes.append(f"opset {opset} became {MIN_OPSET}, which the definition of {OP_TYPE} needs")
    names = [*tail.heads.names, *_other_outputs(old, tail)]
    changed, difference = bool(changes), None
    if (batch := tail.heads.batch) is not None:
        free = free_batch(new, batch)
        try:
            difference = verify_network(old, Topology(free), names, batch, runs=2)
        except SurgeryError as error:
            changes.append(f"the batch stays fixed at {batch}: with another, {error}")
        else:
            new = free
            changes.append(f"the batch, fixed at {batch}, became dynamic")
    if changed and difference is None:
        difference = verify_network(old, Topology(new), names, batch or 1, runs=1)
    if difference is not None:
        changes.append(
            "proved in ONNX Runtime on random images: the network's outputs differ by "
            f"{difference:.1e} of their spread"
        )
    return new, changes


def _batch_norms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == BATCH_NORM for node in model.graph.node)


def _other_outputs(old: Topology, tail: DetectionTail) -> list[str]:
    """Outputs of the graph that its tail does not make."""
    names = [output.name for output in old.model.graph.output]
    return [name for name in names if name not in tail.outputs]


def _opset(model: onnx.ModelProto) -> int:
    versions: list[int] = [e.version for e in model.opset_import if e.domain in ("", "ai.onnx")]
    return max(versions, default=1)


def _check_surgered(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Check that a model with an NMS_OPT_TRT node is whole."""
    again = "start again from the model before its surgery"
    count = sum((n.domain, n.op_type) == (DOMAIN, OP_TYPE) for n in model.graph.node)
    if count != 1:
        raise SurgeryError(f"the graph has {count} {OP_TYPE} nodes, not one: {again}")
    try:
        tail = read_surgered(Topology(model), node)
    except SurgeryError as error:
        raise SurgeryError(f"the graph was operated on before, but {error}; {again}") from error
    functions = [f for f in model.functions if (f.domain, f.name) == (DOMAIN, OP_TYPE)]
    if not functions:
        raise SurgeryError(
            f"the graph has an {OP_TYPE} node but not the function that defines it, without which "
            f"ONNX Runtime cannot run it: {again}"
        )
    opset = _opset(model)
    attributes = tail.attributes
    sigmoid = attributes.confSigmoid == 1
    if functions != [nms_function(attributes.numLayers, opset, sigmoid=sigmoid)]:
        raise SurgeryError(
            f"the function {OP_TYPE} in the model is not the operator's definition for "
            f"{attributes.numLayers} levels and opset {opset}: {again}"
        )


def _replace(old: Topology, tail: DetectionTail) -> onnx.ModelProto:
    """Copy the model with a new tail."""
    heads, attributes = tail.heads, tail.attributes
    node = nms_node([*heads.names, PRIORS], attributes)
    others = [output for output in old.model.graph.output if output.name not in tail.outputs]
    inputs = [value.name for value in old.model.graph.input if value.name not in old.constants]
    body = old.part(inputs, [*heads.names, *(output.name for output in others)])
    body.ir_version = max(old.model.ir_version, MIN_IR_VERSION)
    if _opset(body) < MIN_OPSET:
        try:
            body = version_converter.convert_version(body, MIN_OPSET)
        except (RuntimeError, version_converter.ConvertError) as error:
            raise SurgeryError(
                f"cannot convert opset {_opset(body)} to {MIN_OPSET}: {one_line(error)}; export "
                f"with opset {MIN_OPSET} or later"
            ) from error
    body = fold_batch_norms(body)

    taken = {name for part in body.graph.node for name in (*part.input, *part.output)}
    for name in (*node.output, PRIORS):
        if name in taken.union(value.name for value in others):
            raise SurgeryError(f"the graph has a tensor {name!r} of its own: rename it")
    model = onnx.ModelProto()
    model.CopyFrom(old.model)
    model.ir_version = body.ir_version
    graph = model.graph
    for field in ("node", "initializer", "input", "value_info", "output"):
        graph.ClearField(field)
    graph.node.extend([*body.graph.node, node])
    graph.initializer.extend(body.graph.initializer)
    graph.initializer.append(numpy_helper.from_array(tail.priors, PRIORS))
    graph.input.extend(body.graph.input)
    known = {value.name for value in (*graph.input, *others)}
    graph.value_info.extend(
        value
        for value in (*body.graph.value_info, *body.graph.output)
        if value.name in taken and value.name not in known
    )
    batch = old.types[heads.names[0]].type.tensor_type.shape.dim[0]
    size = batch.dim_value if heads.batch else batch.dim_param or "batch"
    rows = attributes.keepTopK
    detections, count = node.output
    graph.output.extend(
        [
            helper.make_tensor_value_info(detections, TensorProto.FLOAT, [size, rows, 7]),
            helper.make_tensor_value_info(count, TensorProto.INT32, [size]),
            *others,
        ]
    )
    opset = _opset(body)
    domains = [entry for entry in model.opset_import if entry.domain not in ("", "ai.onnx", DOMAIN)]
    model.ClearField("opset_import")
    model.opset_import.extend(
        [helper.make_opsetid("", opset), *domains, helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    )
    model.functions.append(nms_function(len(heads.levels), opset))
    return model

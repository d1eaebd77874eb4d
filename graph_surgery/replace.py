"""The surgery: the tail of a detector out, one NMS_OPT_TRT node in."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_surgery.batch import BATCH, free_batch
from graph_surgery.errors import SurgeryError
from graph_surgery.graph import export_graph, import_graph, namer
from graph_surgery.heads import OPERATOR
from graph_surgery.names import DETECTOR_KEY
from graph_surgery.network import (
    BATCH_NORM,
    channels_first,
    channels_last,
    fold_batch_norms,
    order_channels,
)
from graph_surgery.nms_function import (
    DOMAIN,
    MIN_IR_VERSION,
    MIN_OPSET,
    OP_TYPE,
    OUTPUTS,
    add_nms,
    nms_function,
)
from graph_surgery.normalisation import check_normalised, take_out_normalisation
from graph_surgery.pattern import find_nms_node, find_tail, read_surgered
from graph_surgery.protobuf import check, convert, inputs, opset_of
from graph_surgery.sizes import fold_sizes
from graph_surgery.tail import DetectionTail
from graph_surgery.unfuse import inline_functions, unfuse
from graph_surgery.verify import same_network, verify_network, verify_tail

PRIORS = "nms_priors"
"""Name of the initialiser that holds the priors; a longer one where it is taken."""


LEVEL_CUTTING = "retinanet"
"""What a detector is called that does not say so, of those whose levels have a cut of their own."""

UNIT_KEY = "box_units"
"""Metadata: the unit of boxes, of a model whose boxes were in pixels."""


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

    The outputs of the tail become ``detections`` float32 [N, keepTopK, 7] and ``num_detections``
    int32 [N]; other outputs stay. Old and new tail are run on the same head tensors and must agree.
    Functions of the model are inlined, and what ONNX Runtime's optimiser fused is taken apart.
    Channels of the heads, and of images, are put in order, batch norms are folded into their
    convolutions, a model older than opset 18 is converted to it, and a fixed batch becomes dynamic,
    unless the network computes with it. ImageNet's normalisation of images is taken out: they are
    normalised before. Old and new network are run on the same images and must agree, too. Inputs
    that nothing reads are left out.

    Parameters
    ----------
    model
        A valid ONNX model, with its weights. It is not changed.

    Raises
    ------
    SurgeryError
        When no tail, or not one that the operator can express, is found, or the proof fails;
        when the model has an NMS_OPT_TRT node that is not as this function makes it; when the graph
        normalises its images by other numbers than ImageNet's.
    """
    given = inline_functions(model)
    inlined, unfused = given is not model, unfuse(given)
    model = fold_sizes(unfused)
    graph = import_graph(model)
    if (node := find_nms_node(graph)) is not None:
        _check_surgered(model, graph, node)
        return SurgeryResult(model, False, (f"the graph has its {OP_TYPE} node: nothing to do",))
    tail = find_tail(graph, model)
    new_model, network_changes = _adapt_network(given, _replace(graph, model, tail), tail)
    try:
        check(new_model)
    except SurgeryError as error:
        raise SurgeryError(f"the new graph is invalid: {error}") from error
    agreement = verify_tail(model, new_model, tail)

    folded = _batch_norms(model) - _batch_norms(new_model)
    replaced = len(model.graph.node) - folded - len(new_model.graph.node) + 1
    changes = ["the model's functions were inlined"] if inlined else []
    if unfused is not given:
        changes.append(
            "what ONNX Runtime's optimiser fused into convolutions was taken out of them"
        )
    if model is not unfused:
        changes.append("what was computed of the image's fixed size became constants")
    changes += [
        f"{replaced} nodes behind {len(tail.heads.names)} head convolutions became one {OP_TYPE}",
        f"outputs {', '.join(tail.outputs)} (boxes {agreement.box_order}) became detections "
        "(ymin, xmin, ymax, xmax, clipped to the image) and num_detections",
    ]
    if tail.image and (tail.pixels or agreement.pixels):
        changes.append(_boxes_in_pixels(new_model, tail.image, tail.pixels, agreement.pixels))
    if (layout := tail.heads.layout) != OPERATOR:
        changes.append(
            f"the graph's heads have {layout}: filters of the head convolutions and priors were "
            f"put in the operator's order, {OPERATOR}"
        )
    if tail.attributes.backgroundLabelId < 0:
        changes.append("no class is the background: labels count from 0")
    if tail.attributes.levelTopK:
        metadata = {entry.key: entry.value for entry in new_model.metadata_props}
        onnx.helper.set_model_props(new_model, {DETECTOR_KEY: LEVEL_CUTTING} | metadata)
    changes += _by_level(tail)
    if layout.by_cell:
        changes.append(
            "of equal scores of a class the graph takes the lower cell first, then the lower "
            f"anchor, {OP_TYPE} the lower anchor, then cell"
        )
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


def _by_level(tail: DetectionTail) -> list[str]:
    """Say what version 2 of the operator is for."""
    a = tail.attributes
    if not a.levelTopK:
        return []
    before = "clipped to the image" if a.clipBeforeNms else "as decoded"
    bound = f"dw and dh are at most {a.bboxXformClip:.6g}" if a.bboxXformClip else "no bound of dw"
    lines = [
        f"the {a.levelTopK} best of each level's scores above {a.confidenceThreshold:g} enter "
        f"suppression, over all classes, their boxes {before}; {bound}: {OP_TYPE} version 2"
    ]
    if tail.by_offset:
        lines.append(
            "the graph told classes apart by an offset of their boxes, which rounds them: a box "
            f"whose IoU is that near to {a.nmsThreshold:g} may fall on the other side"
        )
    return lines


def _boxes_in_pixels(
    model: onnx.ModelProto, image: tuple[int, int], decoded: bool, given: bool
) -> str:
    """Write into the metadata, and say, which unit boxes had."""
    size = f"{image[0]} x {image[1]}"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    unit = f"fractions of the image; before the surgery in pixels of {size}"
    onnx.helper.set_model_props(model, metadata | {UNIT_KEY: unit})
    what = [*["decoded"] * decoded, *["given"] * given]
    priors = "the priors were scaled, and " if decoded else ""
    return (
        f"the graph's boxes were {' and '.join(what)} in pixels of {size}: {priors}detections are "
        "in fractions of the image"
    )


def _adapt_network(
    old: onnx.ModelProto, new: onnx.ModelProto, tail: DetectionTail
) -> tuple[onnx.ModelProto, list[str]]:
    """Make the batch of the new model dynamic, prove its network, and say what changed in it."""
    changes = []
    if folded := _batch_norms(old) - _batch_norms(new):
        changes.append(f"{folded} batch norms were folded into their convolutions")
    if (opset := opset_of(old)) < MIN_OPSET:
        changes.append(f"opset {opset} became {MIN_OPSET}, which the definition of {OP_TYPE} needs")
    left = {given.name for given in inputs(new)}
    if unread := [given.name for given in inputs(old) if given.name not in left]:
        changes.append(f"inputs that nothing reads were left out: {', '.join(unread)}")
    names = [*tail.heads.names, *_other_outputs(old, tail)]
    difference, images = None, channels_last(old)
    if images:
        changes.append(
            f"images [N, H, W, C] became [N, C, H, W], as engines take them: {', '.join(images)}"
        )
    channels = _ordered(tail)
    new, normalisation = take_out_normalisation(new)
    maps = {}
    if normalisation is not None:
        maps[normalisation.image] = normalisation.scale, normalisation.shift
        changes.append(
            "the graph normalised its images itself, by ImageNet's mean and deviation of pixels in "
            f"0..{normalisation.top}: taken out, images are normalised before"
        )
    verify = functools.partial(
        verify_network, old, channels=channels, images=images, normalised=maps
    )
    if (batch := tail.heads.batch) is not None:
        free = free_batch(new, batch)
        try:
            difference = verify(free, names, batch, runs=2)
        except SurgeryError as error:
            changes.append(f"the batch stays fixed at {batch}: with another, {error}")
        else:
            new = free
            changes.append(f"the batch, fixed at {batch}, became dynamic")
    changed = channels or images or maps
    if difference is None and (changed or not same_network(old, new, names)):
        difference = verify(new, names, batch or 1, runs=1)
    if difference is not None:
        changes.append(
            "proved in ONNX Runtime on random images: the network's outputs differ by "
            f"{difference:.1e} of their spread"
        )
    return new, changes


def _ordered(tail: DetectionTail) -> dict[str, NDArray[np.intp]]:
    """Heads whose channels are not in the operator's order: which of them comes first, second."""
    places = tail.heads.channels
    return {name: one for name, one in places.items() if (np.diff(one) != 1).any()}


def _batch_norms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == BATCH_NORM for node in model.graph.node)


def _other_outputs(model: onnx.ModelProto, tail: DetectionTail) -> list[str]:
    """Outputs of the graph that its tail does not make."""
    names = [output.name for output in model.graph.output]
    return [name for name in names if name not in tail.outputs]


def _check_surgered(model: onnx.ModelProto, graph: gs.Graph, node: gs.Node) -> None:
    """Check that a model with an NMS_OPT_TRT node is whole."""
    again = "start again from the model before its surgery"
    count = sum((n.domain, n.op_type) == (DOMAIN, OP_TYPE) for n in model.graph.node)
    if count != 1:
        raise SurgeryError(f"the graph has {count} {OP_TYPE} nodes, not one: {again}")
    try:
        attributes = read_surgered(graph, node).attributes
        check_normalised(graph)
    except SurgeryError as error:
        raise SurgeryError(f"the graph was operated on before, but {error}; {again}") from error
    functions = [f for f in model.functions if (f.domain, f.name) == (DOMAIN, OP_TYPE)]
    if not functions:
        raise SurgeryError(
            f"the graph has an {OP_TYPE} node but not the function that defines it, without which "
            f"ONNX Runtime cannot run it: {again}"
        )
    opset = opset_of(model)
    if functions != [nms_function(attributes, opset)]:
        raise SurgeryError(
            f"the function {OP_TYPE} in the model is not the operator's definition for "
            f"{attributes.numLayers} levels and opset {opset}: {again}"
        )


def _replace(graph: gs.Graph, model: onnx.ModelProto, tail: DetectionTail) -> onnx.ModelProto:
    """Give the graph, imported from the model, its new tail."""
    heads, others = tail.heads.names, _other_outputs(model, tail)
    tensors = graph.tensors()
    graph.outputs = [tensors[name] for name in dict.fromkeys([*heads, *others])]
    graph.cleanup(remove_unused_graph_inputs=True, recurse_functions=False)
    graph.ir_version = max(graph.ir_version, MIN_IR_VERSION)
    if graph.opset < MIN_OPSET:
        try:
            model = convert(export_graph(graph, model), MIN_OPSET)
        except SurgeryError as error:
            raise SurgeryError(f"{error}; export with opset {MIN_OPSET} or later") from error
        graph = import_graph(model)
    fold_batch_norms(graph)
    channels_first(graph, channels_last(model))
    tensors = graph.tensors()
    for name in OUTPUTS:
        if name in tensors:
            raise SurgeryError(f"the graph has a tensor {name!r} of its own: rename it")
    graph.outputs = [tensors[name] for name in others]
    order_channels(graph, _ordered(tail))
    read = [*(tensors[name] for name in heads), gs.Constant(namer(graph)(PRIORS), tail.priors)]
    size = tail.heads.batch or tensors[heads[0]].shape[0] or BATCH
    made = add_nms(graph, read, tail.attributes, size)
    graph.outputs = [*made, *graph.outputs]
    return export_graph(graph, model)

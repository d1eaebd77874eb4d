"""Changes to the network in front of the heads.

Batch norms are folded: those of the published resnet34-ssd1200.onnx are nodes of their own, between
which and their convolutions nothing can be quantised. Other exporters' channels are put in order:
those of images, which may come last, and those of heads, which may come anchor by anchor.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, fix, namer, value
from graph_surgery.heads import SHAPE_ONLY
from graph_surgery.protobuf import inputs

BATCH_NORM = "BatchNormalization"
CHANNELS = frozenset({1, 3})
"""Of an image."""

_EPSILON = 1e-5
"""Default of the operator's attribute (ONNX operator reference)."""


def fold_batch_norms(graph: gs.Graph) -> None:
    """Fold every batch norm of a graph into the convolution in front of it.

    y = gamma (W x + b - mean) / sqrt(variance + epsilon) + beta is a convolution with the weights
    s W and the bias s (b - mean) + beta, where s = gamma / sqrt(variance + epsilon). Computed in
    float64. A batch norm that is not the only reader of a float32 convolution with constant
    weights stays as it is.
    """
    name = namer(graph)
    for norm in graph.nodes:
        conv = _convolution_of(graph, norm)
        if conv is None:
            continue
        weight, *bias, gamma, beta, mean, variance = (
            np.asarray(value(graph, tensor), np.float64)
            for tensor in (*conv.inputs[1:], *norm.inputs[1:])
            if not tensor.is_empty()
        )
        scale = gamma / np.sqrt(variance + norm.attrs.get("epsilon", _EPSILON))
        shift = scale * ((bias[0] if bias else 0.0) - mean) + beta
        scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        output = norm.outputs[0]
        stored = conv.inputs[1]
        if len(stored.outputs) > 1:  # others read it as it is
            stored = gs.Constant(name(stored.name), scaled.astype(np.float32))
        else:
            fix(stored, scaled.astype(np.float32))
        added = gs.Constant(name(f"{output.name}_folded_bias"), shift.astype(np.float32))
        conv.inputs = [conv.inputs[0], stored, added]
        norm.outputs.clear()
        conv.outputs = [output]
    graph.cleanup(recurse_functions=False)


def _convolution_of(graph: gs.Graph, norm: gs.Node) -> gs.Node | None:
    """The convolution into which a node can be folded, if it is such a batch norm."""
    if norm.op != BATCH_NORM or sum(not one.is_empty() for one in norm.outputs) > 1:
        return None  # more outputs in training alone
    tensor, kept = norm.inputs[0], {one.name for one in graph.outputs}
    while len(tensor.outputs) == 1 and tensor.name not in kept and tensor.inputs:
        (conv,) = tensor.inputs
        if conv.op != "Identity":
            break
        tensor = conv.inputs[0]
    else:
        return None
    if conv.op != "Conv" or tensor.dtype != np.float32:  # in float16, folding rounds visibly
        return None
    constants = (*conv.inputs[1:], *norm.inputs[1:])
    known = all(one.is_empty() or value(graph, one) is not None for one in constants)
    return conv if known else None


def order_channels(graph: gs.Graph, channels: Mapping[str, NDArray[np.intp]]) -> None:
    """Give convolutions the channels of their outputs in another order, by that of their filters.

    Parameters
    ----------
    channels
        By output: which of its channels the first, second, ... shall be.

    Raises
    ------
    SurgeryError
        When more than the new order is read, or filters cannot be ordered.
    """
    name, tensors = namer(graph), graph.tensors()
    known: dict[tuple[str, bytes], gs.Constant] = {}  # convolutions may share their weights
    for head, places in channels.items():
        (conv,) = tensors[head].inputs
        constants = {t.name: value(graph, t) for t in conv.inputs[1:] if not t.is_empty()}
        lacks = ""
        readers = [node for node in tensors[head].outputs if node.op not in SHAPE_ONLY]
        if readers or any(output is tensors[head] for output in graph.outputs):
            lacks = "others than the postprocessing read it"
        elif conv.attrs.get("group", 1) != 1:
            lacks = "the convolution is in groups"
        elif any(values is None for values in constants.values()):
            lacks = "its weights are no constants"
        if lacks:
            raise SurgeryError(
                f"the channels of head {head!r} follow one another anchor by anchor and cannot be "
                f"put in order, for {lacks} ({describe(conv)}): export with coordinate-major heads "
                "[4 * anchors] and [classes * anchors]"
            )
        for index, tensor in enumerate(conv.inputs):
            if (values := constants.get(tensor.name)) is not None:
                key = tensor.name, places.tobytes()
                if key not in known:
                    known[key] = gs.Constant(name(f"{tensor.name}_ordered"), values[places])
                conv.inputs[index] = known[key]


def channels_last(model: onnx.ModelProto) -> list[str]:
    """Inputs that are images [N, H, W, C]."""
    found = []
    for given in inputs(model):
        sizes = [size.dim_value for size in given.type.tensor_type.shape.dim]
        if len(sizes) == 4 and sizes[3] in CHANNELS and sizes[1] not in CHANNELS:
            found.append(given.name)
    return found


def channels_first(graph: gs.Graph, images: Container[str]) -> None:
    """Make inputs [N, H, W, C] of a graph [N, C, H, W].

    A Transpose turns them back, but for what transposes them itself.
    """
    name = namer(graph)
    for index, last in enumerate(graph.inputs):
        if last.name not in images:
            continue
        batch, height, width, channels = last.shape
        first = gs.Variable(last.name, last.dtype, [batch, channels, height, width])
        last.name = name(f"{last.name}_channels_last")
        graph.inputs[index] = first
        for node in list(last.outputs):
            if node.op == "Transpose" and node.attrs.get("perm") == [0, 3, 1, 2]:
                bypass(graph, node, first)
        if last.outputs or any(output is last for output in graph.outputs):
            turn = {"perm": [0, 2, 3, 1]}
            graph.nodes.append(gs.Node("Transpose", last.name, turn, [first], [last]))
    graph.cleanup(recurse_functions=False)


def bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor) -> None:
    """Let all that read a node read its source, unless the graph gives away what it makes."""
    (made,) = node.outputs
    if any(output is made for output in graph.outputs):
        node.op, node.inputs = "Identity", [source]
        node.attrs.clear()
        return
    for reader in list(made.outputs):
        reader.inputs = [source if tensor is made else tensor for tensor in reader.inputs]

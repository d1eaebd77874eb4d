"""Changes to the network in front of the heads: batch norms folded, the batch made dynamic.

The published resnet34-ssd1200.onnx needs both: its batch norms are nodes of their own, between
which and their convolutions nothing can be quantised, and its batch is fixed at 1.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_surgery.graph import fix, namer, value
from graph_surgery.protobuf import inputs, types

BATCH_NORM = "BatchNormalization"
BATCH = "batch"
"""Name of the size that becomes dynamic."""

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


def free_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Make the fixed batch of a model dynamic.

    Only what the file says of its shapes changes. Whether every node takes another batch shows
    when it is run.

    Parameters
    ----------
    model
        Its images, and every output that depends on them, have the batch as their first size. It
        is not changed.
    batch
        The fixed size.

    Returns
    -------
    ModelProto
        A copy with the first size `BATCH` and inferred shapes.
    """
    new = onnx.ModelProto()
    new.CopyFrom(model)
    graph = new.graph
    for tensor in (*inputs(new), *graph.output):
        size = tensor.type.tensor_type.shape.dim[:1]
        if size and size[0].dim_value == batch:
            size[0].dim_param = BATCH
    graph.ClearField("value_info")
    ends = {tensor.name for tensor in (*graph.input, *graph.output)}
    graph.value_info.extend(known for name, known in types(new).items() if name not in ends)
    return new

"""Changes to the network in front of the heads: batch norms folded, the batch made dynamic.

The published resnet34-ssd1200.onnx needs both: its batch norms are nodes of their own, between
which and their convolutions nothing can be quantised, and its batch is fixed at 1.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from graph_surgery.topology import Topology, data_inputs

BATCH_NORM = "BatchNormalization"
BATCH = "batch"
"""Name of the size that becomes dynamic."""

_EPSILON = 1e-5
"""Default of the operator's attribute (ONNX operator reference)."""


def fold_batch_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold every batch norm into the convolution in front of it.

    y = gamma (W x + b - mean) / sqrt(variance + epsilon) + beta is a convolution with the weights
    s W and the bias s (b - mean) + beta, where s = gamma / sqrt(variance + epsilon). Computed in
    float64.

    Parameters
    ----------
    model
        It is not changed.

    Returns
    -------
    ModelProto
        A copy. A batch norm that is not the only reader of a float32 convolution with constant
        weights of its own stays as it is.
    """
    graph = Topology(model)
    new = onnx.ModelProto()
    new.CopyFrom(model)
    folded: set[int] = set()
    for index, norm in enumerate(graph.nodes):
        source = _convolution_of(graph, norm)
        if source is None:
            continue
        conv = graph.nodes[source]
        weight, *bias, gamma, beta, mean, variance = (
            np.asarray(graph.value(name), np.float64)
            for name in (*conv.input[1:], *norm.input[1:])
            if name
        )
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _EPSILON)
        scale = gamma / np.sqrt(variance + epsilon)
        shift = scale * ((bias[0] if bias else 0.0) - mean) + beta
        names = [conv.input[1], f"{norm.output[0]}_folded_bias"]
        values = [weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), shift]
        stored = [tensor for tensor in new.graph.initializer if tensor.name not in names]
        stored += [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in zip(names, values, strict=True)
        ]
        new.graph.ClearField("initializer")
        new.graph.initializer.extend(stored)
        new.graph.node[source].input[1:] = names
        new.graph.node[source].output[0] = norm.output[0]
        folded.add(index)
    nodes = [node for index, node in enumerate(new.graph.node) if index not in folded]
    read = {name for node in nodes for name in data_inputs(node)}
    read.update(value.name for value in new.graph.output)
    initializers = [tensor for tensor in new.graph.initializer if tensor.name in read]
    new.graph.ClearField("node")
    new.graph.ClearField("initializer")
    new.graph.node.extend(nodes)
    new.graph.initializer.extend(initializers)
    return new


def _convolution_of(graph: Topology, norm: onnx.NodeProto) -> int | None:
    """The convolution into which a node can be folded, if it is such a batch norm."""
    source = graph.producer.get(norm.input[0]) if norm.input else None
    if norm.op_type != BATCH_NORM or source is None:
        return None
    conv = graph.nodes[source]
    if conv.op_type != "Conv" or sum(map(bool, norm.output)) > 1:  # more in training alone
        return None
    if graph.dtype(conv.output[0]) != np.float32:  # in float16, folding rounds visibly
        return None
    alone = (
        graph.consumers[conv.output[0]] == [graph.producer[norm.output[0]]]
        and graph.consumers[conv.input[1]] == [source]
        and conv.output[0] not in {value.name for value in graph.model.graph.output}
        and conv.input[1] in {tensor.name for tensor in graph.model.graph.initializer}
    )
    constants = [name for name in (*conv.input[1:], *norm.input[1:]) if name]
    return source if alone and all(graph.value(name) is not None for name in constants) else None


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
    for value in (*graph.input, *graph.output):
        size = value.type.tensor_type.shape.dim[:1]
        if size and size[0].dim_value == batch:
            size[0].dim_param = BATCH
    graph.ClearField("value_info")
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(new)
    return inferred

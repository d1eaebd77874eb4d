"""Q/DQ pairs around what a placement quantises, in the form that all engines read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from engine.quantization.placement import Placement
from engine.quantization.scales import FloatType, activation_scale
from engine.quantization.weights import scales_of_weights
from graph_surgery.graph import fix, namer, value


def insert_qdq(
    graph: gs.Graph,
    placement: Placement,
    scales: Mapping[str, float],
    layers: Iterable[int],
    float_type: FloatType = "fp32",
) -> None:
    """Add Q/DQ pairs at some layers of a graph; its inputs and outputs stay as they are.

    Parameters
    ----------
    scales
        Of every tensor that these layers read.
    layers
        Indices into ``placement.layers``.
    float_type
        Type that what is not INT8 will have; here it stays float32.
    """
    chosen = set(layers)
    read = quantise_activations(graph, placement, scales, chosen)
    weights = scales_of_weights(graph, placement, chosen, read, float_type)
    tensors, name = graph.tensors(), namer(graph)
    for index in sorted(chosen):
        layer = placement.layers[index]
        (conv,) = tensors[layer.node].inputs
        held = tensors[layer.weight]
        if isinstance(held, gs.Variable):  # engines want it stored
            fix(held, np.asarray(value(graph, held), np.float32))
        conv.inputs[1] = _pair(graph, held, weights[layer.weight], name, axis=0)


def quantise_activations(
    graph: gs.Graph, placement: Placement, scales: Mapping[str, float], layers: Set[int]
) -> dict[str, np.float32]:
    """Add the Q/DQ pairs of activations alone; the scale that each reader takes, by its node."""
    tensors, name = graph.tensors(), namer(graph)
    done: dict[str, gs.Tensor] = {}
    read: dict[str, np.float32] = {}
    for point in placement.points:
        if point.layer in layers:
            read[point.node] = activation_scale(scales[point.source])
            if point.tensor not in done:
                done[point.tensor] = _pair(graph, tensors[point.tensor], read[point.node], name)
            (node,) = tensors[point.node].inputs
            node.inputs[point.input] = done[point.tensor]
    return read


def _pair(
    graph: gs.Graph,
    tensor: gs.Tensor,
    scale: np.float32 | NDArray[np.float32],
    name: Callable[[str], str],
    **attributes: int,
) -> gs.Tensor:
    """Add QuantizeLinear and DequantizeLinear of a tensor, zero point 0; what they make."""
    constants = [
        gs.Constant(name(f"{tensor.name}_scale"), np.asarray(scale)),
        gs.Constant(name(f"{tensor.name}_zero_point"), np.zeros(np.shape(scale), np.int8)),
    ]
    made = tensor
    for op, part in (("QuantizeLinear", "quantized"), ("DequantizeLinear", "dequantized")):
        output = gs.Variable(name(f"{tensor.name}_{part}"))
        inputs = [made, *constants]
        graph.layer(op=op, name=output.name, inputs=inputs, outputs=[output], attrs=attributes)
        made = output
    return made

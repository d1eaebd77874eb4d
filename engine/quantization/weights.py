"""Scales of the weights of a placement's layers, which layers may share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from engine.quantization.placement import Placement
from engine.quantization.scales import FloatType, weight_scales
from graph_surgery.graph import value


def scales_of_weights(
    graph: gs.Graph,
    placement: Placement,
    layers: Iterable[int],
    read: Mapping[str, np.float32],
    float_type: FloatType = "fp32",
) -> dict[str, NDArray[np.float32]]:
    """Scale of every output channel of the weights of some layers, float32 [M], by their names.

    Weights that several layers share, as the heads of a feature pyramid, have one scale, and so
    are the same in INT8: the largest that one of the layers needs (`weight_scales`), which differ
    where biases are large. The Q/DQ pairs stay one a layer: of a pair that layers
    shared, ONNX Runtime 1.32 on a processor without VNNI made a graph that it refused itself.

    Parameters
    ----------
    layers
        Indices into ``placement.layers``.
    read
        Scale of what a layer reads, by its node.
    """
    tensors = graph.tensors()
    found: dict[str, NDArray[np.float32]] = {}
    for index in layers:
        layer = placement.layers[index]
        weight = np.asarray(value(graph, tensors[layer.weight]), np.float32)
        scale = weight_scales(weight, layer.bias, read[layer.node], float_type)
        found[layer.weight] = np.maximum(scale, found.get(layer.weight, scale))
    return found

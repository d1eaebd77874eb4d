"""An INT8 network in NumPy: the float network, its scales, and what Q/DQ means, node by node.

Independent of the graph that `engine quantize` writes: of the project it asks only where (the
points of a placement) and how coarse (the scales of a calibration).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from engine.quantization.cache import Calibration
from engine.quantization.placement import find_placement
from graph_surgery.nms_function import OP_TYPE, NmsAttributes
from tests.support import nms_oracle

NEAR = 1e-3
"""In steps: so near to the middle between two, rounding in float32 may go either way."""


def rounded(x: np.ndarray, scale: np.ndarray, told: np.ndarray | None = None) -> np.ndarray:
    """To the nearest of 256 steps; from the middle between two to the one told, else the even."""
    place = x / scale
    steps = np.rint(place).clip(-128, 127)
    if told is not None:
        either = (np.abs(place - steps) > 0.5 - NEAR) & (np.abs(place - told) < 0.5 + NEAR)
        steps = np.where(either, told, steps)
    return np.float32(steps * scale)


def step(scale: float) -> np.float32:
    """The least float16 that is not below."""
    half = np.float16(scale)
    return np.float32(half if float(half) >= scale else np.nextafter(half, np.float16(np.inf)))


def heads(
    model: onnx.ModelProto,
    calibration: Calibration,
    images: np.ndarray,
    told: Mapping[str, np.ndarray],
) -> list[np.ndarray]:
    """Head tensors, loc then conf, of the surgered float detector as INT8.

    Parameters
    ----------
    images
        int8, or float32 where the first convolution does not read them as they are.
    told
        int8 values of activations, for places between two steps.

    Biases must not be so large that they widen the steps of weights.
    """
    placement = find_placement(model)
    scales = {name: step(scale) for name, scale in calibration.scales.items()}
    points = {(point.node, point.input): scales[point.source] for point in placement.points}
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    scale = scales[placement.image] if images.dtype == np.int8 else np.float32(1)
    known |= {"": None, placement.image: images * scale}
    for node in model.graph.node:
        if node.op_type == OP_TYPE:
            return [known[name] for name in node.input[:-1]]
        if not all(name in known for name in node.input):
            continue  # it reads an input that the heads do not depend on
        values = [known[name] for name in node.input]
        for index in range(len(values)):
            if (node.output[0], index) in points:
                name = node.input[index]
                values[index] = rounded(
                    values[index], points[node.output[0], index], told.get(name)
                )
        if node.op_type == "Conv":
            largest = np.abs(values[1]).max(axis=(1, 2, 3), keepdims=True)
            values[1] = rounded(values[1], np.float32(largest.astype(np.float64) / 127))
        results = evaluate(model, node, values)
        known |= dict(zip(node.output, results, strict=True))
    raise AssertionError(f"the model has no {OP_TYPE}")


def evaluate(model: onnx.ModelProto, node: onnx.NodeProto, values: list) -> list[np.ndarray]:
    """One node, by ONNX's reference in NumPy."""
    inputs = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    one = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    feeds = {n: v for n, v in zip(node.input, values, strict=True) if n}
    return ReferenceEvaluator(one).run(None, feeds)


def rows(model: onnx.ModelProto, tensors: list[np.ndarray]) -> list[np.ndarray]:
    """Detections [n, 6] of every image, by the oracle, of the head tensors."""
    node = next(node for node in model.graph.node if node.op_type == OP_TYPE)
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    own = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    named = {name: own[name] for name in NmsAttributes.__dataclass_fields__ if name in own}
    attributes = NmsAttributes(**(named | {"inputOrder": tuple(own["inputOrder"])}))
    levels, images = attributes.numLayers, len(tensors[0])
    loc, conf = (
        np.concatenate([x.reshape(images, size, -1) for x in part], axis=2)
        for part, size in ((tensors[:levels], 4), (tensors[levels:], attributes.numClasses))
    )
    priors = known[node.input[-1]]
    grids = [(x.shape[1] // 4, *x.shape[2:]) for x in tensors[:levels]]
    detections, counts = nms_oracle.nms_opt(attributes, priors, loc, conf, grids)
    return [found[:count, 1:] for found, count in zip(detections, counts, strict=True)]

"""Bias correction: what quantisation adds to a convolution on average is taken off its bias.

The empirical form of M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization
through Weight Equalization and Bias Correction", 2019 (appendix D), a layer at a time: on the
inputs that the float network gives it, every convolution is held against itself with input and
weights in steps, and the mean of the difference over images and positions, per output channel, is
the correction. The layers do not depend on each other so, and one pass finds all of them; the paper
corrects a layer behind corrected ones, which takes a pass a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from engine.data.preprocessed import PreprocessedSet, images_sha256
from engine.errors import EngineError
from engine.model import Detector
from engine.quantization.cache import Calibration
from engine.quantization.calibration import check_images
from engine.quantization.cpu import quantise_activations_for_cpu
from engine.quantization.network import heads_model, open_session, run
from engine.quantization.observe import Progress
from engine.quantization.placement import Placement, find_placement
from engine.quantization.qdq import quantise_activations
from engine.quantization.scales import FloatType, Target, round_up
from engine.quantization.thresholds import STEPS
from engine.quantization.weights import scales_of_weights
from graph_surgery.graph import export_graph, import_graph, namer, value

Biases = Mapping[str, NDArray[np.float32]]
"""Biases float32 [filters] of convolutions, by `engine.quantization.placement.Layer.node`."""


def correct_biases(
    detector: Detector,
    calibration: Calibration,
    images: PreprocessedSet,
    *,
    float_type: FloatType = "fp32",
    target: Target = "gpu",
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Find the biases with which no convolution is off on average, in one pass over the images.

    An image runs through the float network and, in the same run, through every convolution in
    steps; of both only the mean difference leaves it, so that memory does not grow with the images.

    Parameters
    ----------
    detector
        Surgered FP32 detector.
    calibration
        Its scales.
    images
        The images that these are from: no others may shape an INT8 network, says MLPerf.
    float_type, target
        As for `engine.quantization.quantize.quantize`.
    progress
        Told after every batch.

    Returns
    -------
    dict
        Of every convolution whose bias is a constant, or that has none.

    Raises
    ------
    EngineError
        When the calibration is another model's or of other images, an image cannot be read, or
        ONNX Runtime fails.
    """
    placement = find_placement(detector.model)
    calibration.check(detector.model, placement)
    batch = placement.batch or 1
    count = check_images(placement, images, calibration.images, batch)
    if images_sha256(images, count) != calibration.images_sha256:
        raise EngineError(
            f"{images.directory}: not the images of the calibration, and biases are corrected on "
            "these alone; calibrate with them"
        )
    model, outputs = _differences(detector.model, placement, calibration, float_type, target)
    session = open_session(model)
    sums: dict[str, NDArray[np.float64]] = {}
    for start in range(0, count, batch):
        chosen = range(start, start + batch)
        pixels = images.load(chosen).astype(np.float32, copy=False)
        found = run(session, list(outputs.values()), placement.image, pixels, images.files[start])
        for node, means in zip(outputs, found, strict=True):
            total = means.sum(axis=(0, 2, 3), dtype=np.float64)
            sums[node] = sums[node] + total if node in sums else total
        if progress is not None:
            progress(start + batch, count)
    biases = {layer.node: layer.bias for layer in placement.layers}
    corrected = {}
    for node, total in sums.items():
        bias = biases[node]
        corrected[node] = (total / count + (0 if bias is None else bias)).astype(np.float32)
    return corrected


def set_biases(
    graph: gs.Graph, placement: Placement, biases: Biases, layers: Iterable[int]
) -> Placement:
    """Give some layers of a float graph other biases, where there are; what knows of these."""
    tensors, name = graph.tensors(), namer(graph)
    known = list(placement.layers)
    for index in layers:
        node = known[index].node
        if node in biases:
            (conv,) = tensors[node].inputs
            conv.inputs = [*conv.inputs[:2], gs.Constant(name(f"{node}_bias"), biases[node])]
            known[index] = replace(known[index], bias=biases[node])
    return replace(placement, layers=tuple(known))


def _differences(
    network: onnx.ModelProto,
    placement: Placement,
    calibration: Calibration,
    float_type: FloatType,
    target: Target,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The float network with each convolution's mean loss to quantisation as its outputs.

    Returns
    -------
    model, outputs
        The tensors float32 [N, filters, 1, 1], by the node of their convolution.
    """
    graph = import_graph(network)
    every = frozenset(range(len(placement.layers)))
    unchanged = [(node, list(node.inputs)) for node in graph.nodes]
    if target == "cpu":
        scales, sums = calibration.scales, calibration.sums
        read, _ = quantise_activations_for_cpu(graph, placement, scales, sums, every)
    else:
        read = quantise_activations(graph, placement, calibration.scales, every)
    weights = scales_of_weights(graph, placement, every, read, float_type)
    tensors, name = graph.tensors(), namer(graph)
    pairs = []
    for layer in placement.layers:
        (conv,) = tensors[layer.node].inputs
        if layer.bias is None and len(conv.inputs) > 2 and not conv.inputs[2].is_empty():
            continue
        scale = weights[layer.weight].reshape(-1, 1, 1, 1)
        weight = np.asarray(value(graph, tensors[layer.weight]), np.float32)
        if float_type == "fp16":  # as the graph holds both, which moves some to the next step
            scale = round_up(scale).astype(np.float32)
            weight = weight.astype(np.float16).astype(np.float32)
        steps = np.rint(weight / scale).clip(-STEPS, STEPS)
        held = gs.Constant(name(f"{layer.weight}_in_steps"), (steps * scale).astype(np.float32))
        pairs.append((layer.node, conv, [conv.inputs[0], held, *conv.inputs[2:]]))
    for node, inputs in unchanged:
        node.inputs = inputs
    outputs = {}
    for layer_node, conv, inputs in pairs:
        made = [name(f"{layer_node}_{part}") for part in ("in_steps", "lost", "lost_on_average")]
        in_steps, lost, mean = map(gs.Variable, made)
        graph.layer(op="Conv", name=made[0], inputs=inputs, outputs=[in_steps], attrs=conv.attrs)
        both = [tensors[layer_node], in_steps]
        graph.layer(op="Sub", name=made[1], inputs=both, outputs=[lost])
        graph.layer(op="GlobalAveragePool", name=made[2], inputs=[lost], outputs=[mean])
        outputs[layer_node] = made[2]
    model = export_graph(graph, network)
    return heads_model(model, placement, list(outputs.values())), outputs

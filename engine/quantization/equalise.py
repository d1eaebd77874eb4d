"""Equalisation of channels: an FP32 network of the same answers whose channels have like ranges.

A tensor in INT8 has one scale, and a channel of small values few of its steps. Multiplied by a
factor a channel, which the ReLU, the pooling and the addition let through, its values are divided
by the weights that read them: the network computes the same (M. Nagel et al., "Data-Free
Quantization through Weight Equalization and Bias Correction", 2019, section 4.1). Weights have a
scale for each filter, so that the filters that make a channel lose nothing by its factor; those
that read it lose as it moves their weights apart. The factor is therefore a power below 1 of what
would give all channels one range, and ranges are those of activations on images (G. Xiao et al.,
"SmoothQuant", 2023, equation 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from engine.data.preprocessed import PreprocessedSet
from engine.errors import EngineError
from engine.model import Detector
from engine.protocol import EQUALISED_KEY
from engine.quantization.calibration import check_images
from engine.quantization.network import heads_model, open_session, run
from engine.quantization.observe import Progress
from engine.quantization.placement import Placement, find_placement
from graph_surgery.graph import export_graph, fix, import_graph, namer, shape_of, upstream, value

POWER = 0.25
"""Of the range of a channel, relative to the widest; of 1/4 and 1/2 (SmoothQuant's own) what kept
more of the demo model (`docs/calibration.md`)."""

_NARROWEST = 1 / 32
"""Channels narrower than this share of the widest, as those that are always 0, count as this."""

_THROUGH = ("Relu", "MaxPool", "Add")
"""What a factor larger than 0 goes through."""


def equalise(
    detector: Detector, images: PreprocessedSet, *, progress: Progress | None = None
) -> onnx.ModelProto:
    """Write a surgered FP32 detector with factors for the channels between its convolutions.

    Tensors that additions join have the same factors. Nothing else changes: image, heads, and what
    is read by anything but convolutions and what lets factors through keep their values.

    Parameters
    ----------
    detector
        It is not changed.
    images
        float32 images of its input, those of the calibration.
    progress
        Told after every batch.

    Raises
    ------
    EngineError
        For an unusable model or images, a network without such tensors, or when ONNX Runtime fails.
    """
    placement = find_placement(detector.model)
    graph = import_graph(detector.model)
    groups = _groups(graph, placement)
    if not groups:
        raise EngineError("no tensor lies between convolutions alone: there is nothing to equalise")
    count = check_images(placement, images, None, placement.batch or 1)
    chosen = [name for name in placement.tensors if name in groups]
    ranges = _ranges(detector.model, placement, chosen, images, progress)
    known: dict[str, NDArray[np.float64]] = {}
    for root in dict.fromkeys(groups.values()):
        found = [ranges[name] for name in ranges if groups[name] == root]
        if found:
            shares = [np.maximum(one / (one.max() or 1), _NARROWEST) for one in found]
            known[root] = np.exp(POWER * np.mean(np.log(shares), axis=0))
    tensors = graph.tensors()
    for layer in placement.layers:
        (conv,) = tensors[layer.node].inputs
        weight = np.asarray(value(graph, conv.inputs[1]), np.float64)
        made = known.get(groups.get(layer.node, ""))
        read = known.get(groups.get(conv.inputs[0].name, ""))
        if read is not None:
            weight = weight * read[:, None, None]
        if made is not None:
            weight = weight / made[:, None, None, None]
            if layer.bias is not None:
                fix(conv.inputs[2], (layer.bias / made).astype(np.float32))
        if made is not None or read is not None:
            fix(conv.inputs[1], weight.astype(np.float32))
    new = export_graph(graph, detector.model)
    metadata = {entry.key: entry.value for entry in detector.model.metadata_props}
    helper.set_model_props(new, metadata | {EQUALISED_KEY: str(count)})
    return new


def _groups(graph: gs.Graph, placement: Placement) -> dict[str, str]:
    """Which tensors share their factors: a name for each group, by tensor; what has none is out."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parents.setdefault(name, name)) != name:
            name = above
        return name

    tensors = graph.tensors()
    network = upstream(graph, [tensors[name] for name in placement.heads])
    inside = {node.outputs[0].name for node in network}
    fixed = {placement.image, *placement.heads, *(tensor.name for tensor in graph.outputs)}
    for node in network:
        touched = [tensor.name for tensor in chain(node.inputs, node.outputs)]
        if node.op == "Conv":
            touched = [node.inputs[0].name, node.outputs[0].name]
            computed = [one for one in node.inputs[1:] if not isinstance(one, gs.Constant)]
            shared = any(len(one.outputs) > 1 for one in node.inputs[1:])
            if computed or shared or node.attrs.get("group", 1) != 1:
                fixed.update(touched)
        elif node.op in _THROUGH and len(node.outputs) == 1:
            read = node.inputs if node.op == "Add" else node.inputs[:1]
            channels = {tuple((shape_of(tensor) or [])[1:2]) for tensor in read}
            if len(channels) > 1 or any(value(graph, one) is not None for one in read):
                fixed.update(touched)
            for tensor in read:
                parents[root(tensor.name)] = root(node.outputs[0].name)
        else:
            fixed.update(touched)
        for tensor in node.outputs:
            if any(reader.outputs[0].name not in inside for reader in tensor.outputs):
                fixed.add(tensor.name)
    out = {root(name) for name in fixed}
    between = chain.from_iterable((node.inputs[0], node.outputs[0]) for node in network)
    names = dict.fromkeys(tensor.name for tensor in between)
    return {name: root(name) for name in names if root(name) not in out}


def _ranges(
    network: onnx.ModelProto,
    placement: Placement,
    chosen: Sequence[str],
    images: PreprocessedSet,
    progress: Progress | None,
) -> dict[str, NDArray[np.float64]]:
    """Mean over the images of every channel's largest magnitude, float64 [C], of some tensors."""
    graph = import_graph(network)
    tensors, name = graph.tensors(), namer(graph)
    outputs = []
    for read in chosen:
        made = [gs.Variable(name(f"{read}_{part}")) for part in ("size", "largest")]
        for op, source, one in zip(
            ("Abs", "GlobalMaxPool"), (tensors[read], made[0]), made, strict=True
        ):
            graph.layer(op=op, name=one.name, inputs=[source], outputs=[one])
        outputs.append(made[1].name)
    session = open_session(heads_model(export_graph(graph, network), placement, outputs))
    sums: dict[str, NDArray[np.float64]] = {}
    batch, count = placement.batch or 1, len(images.files)
    for start in range(0, count, batch):
        pixels = images.load(range(start, min(start + batch, count))).astype(np.float32, copy=False)
        found = run(session, outputs, placement.image, pixels, images.files[start])
        for read, largest in zip(chosen, found, strict=True):
            total = largest.sum(axis=(0, 2, 3), dtype=np.float64)
            sums[read] = sums[read] + total if start else total
        if progress is not None:
            progress(start + len(pixels), count)
    return {read: total / count for read, total in sums.items()}

"""Q/DQ in the form that ONNX Runtime runs in integers on a CPU.

Its kernels take unsigned activations and signed weights, biases in int32 steps of both scales, and
a Q behind every convolution: DequantizeLinear, Conv, (Relu,) QuantizeLinear become a QLinearConv
(a ReLU is what a zero point of 0 clips), an addition with both inputs and its ReLU behind it a
QLinearAdd, a max pooling with one scale on both sides an integer one. A convolution whose output
stays float, as a head, is faster in float32 (a ConvInteger takes twice as long) and gets the same
numbers there, activations and weights in steps. The image comes in as for all engines, signed, and
is shifted; a convolution of its three channels by strides of 2 reads blocks of 2x2 pixels as twelve
channels, with the same sums: its kernel gathers the channels of one pixel at a time. (Facts: ONNX
Runtime's QDQ selectors, onnxruntime/core/optimizer/qdq_transformer.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.quantization.placement import Placement, copied, not_negative
from engine.quantization.scales import activation_scale
from engine.quantization.thresholds import STEPS
from engine.quantization.weights import scales_of_weights
from graph_surgery.graph import namer, shape_of, value

_UNSIGNED_STEPS = 255
_MIDDLE = 128
_FEW = 4
"""Channels of a pixel that are too few to be gathered one pixel at a time."""


@dataclass(frozen=True)
class _Quantised:
    """An activation: its scale and zero point, and what stands for it in float."""

    scale: np.float32
    zero_point: int
    real: gs.Tensor


def insert_for_cpu(
    graph: gs.Graph,
    placement: Placement,
    scales: Mapping[str, float],
    sums: Mapping[str, float],
    layers: Iterable[int],
) -> None:
    """Quantise some layers of a graph; its inputs and outputs stay as they are.

    Parameters
    ----------
    scales
        Of every tensor that these layers read, as for `engine.quantization.qdq.insert_qdq`.
        Tensors that are not negative are taken in 255 steps in place of 127.
    sums
        Of every tensor of ``placement.mains`` whose layer is chosen.
    layers
        Indices into ``placement.layers``.

    Raises
    ------
    EngineError
        When a scale of `sums` is missing.
    """
    chosen = set(layers)
    read, done = quantise_activations_for_cpu(graph, placement, scales, sums, chosen)
    weights = scales_of_weights(graph, placement, chosen, read)
    tensors, name = graph.tensors(), namer(graph)
    for index in sorted(chosen):
        layer = placement.layers[index]
        (conv,) = tensors[layer.node].inputs
        weight = np.asarray(value(graph, tensors[layer.weight]), np.float32)
        scale = weights[layer.weight]
        wide = scale.reshape(-1, 1, 1, 1)
        steps = np.rint(weight / wide).clip(-STEPS, STEPS)
        if not _is_quantised(conv.outputs[0], done):
            rounded = (steps * wide).astype(np.float32)
            conv.inputs[1] = gs.Constant(name(f"{layer.weight}_rounded"), rounded)
            continue
        steps = steps.astype(np.int8)
        conv, steps = _packed(graph, conv, steps, name)
        held = gs.Constant(name(f"{layer.weight}_int8"), steps)
        conv.inputs[1] = _dequantised(graph, held, scale, name)
        if layer.bias is not None:
            both = read[layer.node] * scale
            bias = np.rint(layer.bias / both.astype(np.float64)).astype(np.int32)
            held = gs.Constant(name(f"{layer.node}_bias_int32"), bias)
            conv.inputs[2] = _dequantised(graph, held, both, name)


def quantise_activations_for_cpu(
    graph: gs.Graph,
    placement: Placement,
    scales: Mapping[str, float],
    sums: Mapping[str, float],
    layers: Set[int],
) -> tuple[dict[str, np.float32], dict[str, _Quantised]]:
    """Quantise the activations alone; see `insert_for_cpu`.

    Returns
    -------
    read, done
        The scale that each reader takes, by its node; what was quantised, by its tensor.
    """
    tensors, name = graph.tensors(), namer(graph)
    if missing := [
        main.tensor for main in placement.mains if main.layer in layers and main.tensor not in sums
    ]:
        raise EngineError(
            f"the calibration has no scale for {missing[0]!r}, which --target cpu needs: it is of "
            "an earlier release; calibrate again"
        )
    done: dict[str, _Quantised] = {}

    def quantised(tensor: str, scale: float) -> _Quantised:
        if tensor in done:
            return done[tensor]
        step, zero_point = activation_scale(scale), _MIDDLE
        source = copied(tensors[tensor])
        if source is not None and source.name in done:  # one scale on both sides
            step, zero_point = done[source.name].scale, done[source.name].zero_point
        elif not_negative(tensors[tensor]):
            step, zero_point = np.float32(step * STEPS / _UNSIGNED_STEPS), 0
        done[tensor] = _pair(graph, tensors[tensor], step, zero_point, name)
        return done[tensor]

    points = [
        (p.node, p.input, quantised(p.tensor, scales[p.source]))
        for p in placement.points
        if p.layer in layers
    ]
    points += [
        (p.node, p.input, quantised(p.tensor, sums[p.tensor]))
        for p in placement.mains
        if p.layer in layers
    ]
    read = {}
    for node_name, index, what in points:
        (node,) = tensors[node_name].inputs
        node.inputs[index] = what.real
        read[node_name] = what.scale
    return read, done


def _packed(
    graph: gs.Graph, conv: gs.Node, weight: NDArray[np.int8], name: Callable[[str], str]
) -> tuple[gs.Node, NDArray[np.int8]]:
    """Let a convolution of few channels and stride 2 read blocks of 2x2 pixels as channels.

    Returns
    -------
    conv, weight
        The node and int8 [M, 4 * C, KH, KW]; both as they are where it is no such convolution.
    """
    (dequantise,) = conv.inputs[0].inputs
    steps, *constants = dequantise.inputs
    shape = shape_of(steps.inputs[0].inputs[0])
    filters, channels, *kernel = weight.shape
    pads = conv.attrs.get("pads", [0] * 4)
    plain = (
        conv.outputs[0] not in graph.outputs
        and conv.attrs.get("group", 1) == 1
        and set(conv.attrs.get("dilations", [1])) == {1}
    )
    if not plain or channels > _FEW or list(conv.attrs.get("strides", [])) != [2, 2]:
        return conv, weight
    sizes = [None, None] if shape is None else shape[2:]
    if conv.attrs.get("auto_pad", "NOTSET") != "NOTSET" or any(
        size is None or size % 2 for size in sizes
    ):
        return conv, weight
    before, behind, blocks = [], [], []
    for size, length, first, last in zip(sizes, kernel, pads[:2], pads[2:], strict=True):
        outputs = ((size or 0) + first + last - length) // 2 + 1
        before.append((first + 1) // 2)
        blocks.append((length + first % 2 + 1) // 2)
        behind.append(outputs - 1 + blocks[-1] - before[-1] - (size or 0) // 2)
    if min(behind) < 0:
        return conv, weight
    wide = np.zeros((filters, channels, 2 * blocks[0], 2 * blocks[1]), np.int8)
    top, left = pads[0] % 2, pads[1] % 2
    wide[:, :, top : top + kernel[0], left : left + kernel[1]] = weight
    parts = wide.reshape(filters, channels, blocks[0], 2, blocks[1], 2)
    names = [name(f"{steps.name}_{part}") for part in ("blocks", "blocks_dequantized")]
    made, real = map(gs.Variable, names)
    graph.layer(
        op="SpaceToDepth", name=names[0], inputs=[steps], outputs=[made], attrs={"blocksize": 2}
    )
    graph.layer(op="DequantizeLinear", name=names[1], inputs=[made, *constants], outputs=[real])
    (output,) = conv.outputs
    new = gs.Variable(name(f"{output.name}_of_blocks"))
    for reader in list(output.outputs):
        reader.inputs = [new if tensor is output else tensor for tensor in reader.inputs]
    conv.outputs.clear()
    geometry = {"kernel_shape": blocks, "strides": [1, 1], "pads": [*before, *behind]}
    inputs = [real, *conv.inputs[1:]]
    graph.layer(op="Conv", name=new.name, inputs=inputs, outputs=[new], attrs=geometry)
    return new.inputs[0], parts.transpose(0, 3, 5, 1, 2, 4).reshape(filters, 4 * channels, *blocks)


def shift_image(graph: gs.Graph, image: str) -> float | None:
    """Let the image come in as INT8 and make it unsigned; its scale, None where it stays float."""
    (tensor,) = (one for one in graph.inputs if one.name == image)
    for quantise in tensor.outputs:
        if quantise.op == "QuantizeLinear":
            scale, name = quantise.inputs[1], namer(graph)
            tensor.dtype = np.dtype(np.int8)
            real = gs.Variable(name(f"{image}_float"))
            zero = gs.Constant(name(f"{image}_int8_zero_point"), np.zeros((), np.int8))
            inputs = [tensor, scale, zero]
            graph.layer(op="DequantizeLinear", name=real.name, inputs=inputs, outputs=[real])
            quantise.inputs[0] = real
            return float(scale.values)
    return None


def _is_quantised(tensor: gs.Tensor, done: Mapping[str, _Quantised]) -> bool:
    """Whether a convolution's output, or the ReLU behind it, is read in steps alone."""
    if tensor.name in done:
        return [node.op for node in tensor.outputs] == ["QuantizeLinear"]
    readers = tensor.outputs
    return [node.op for node in readers] == ["Relu"] and _is_quantised(readers[0].outputs[0], done)


def _pair(
    graph: gs.Graph,
    tensor: gs.Tensor,
    scale: np.float32,
    zero_point: int,
    name: Callable[[str], str],
) -> _Quantised:
    constants = [
        gs.Constant(name(f"{tensor.name}_scale"), np.asarray(scale)),
        gs.Constant(name(f"{tensor.name}_zero_point"), np.asarray(zero_point, np.uint8)),
    ]
    made = tensor
    for op, part in (("QuantizeLinear", "quantized"), ("DequantizeLinear", "dequantized")):
        output = gs.Variable(name(f"{tensor.name}_{part}"))
        graph.layer(op=op, name=output.name, inputs=[made, *constants], outputs=[output])
        made = output
    return _Quantised(scale, zero_point, made)


def _dequantised(
    graph: gs.Graph, steps: gs.Constant, scale: NDArray[np.float32], name: Callable[[str], str]
) -> gs.Tensor:
    """Constants of a convolution, one scale for each of its outputs."""
    constants = [
        gs.Constant(name(f"{steps.name}_scale"), scale.astype(np.float32)),
        gs.Constant(name(f"{steps.name}_zero_point"), np.zeros(len(scale), steps.values.dtype)),
    ]
    real = gs.Variable(name(f"{steps.name}_dequantized"))
    graph.layer(
        op="DequantizeLinear",
        name=real.name,
        inputs=[steps, *constants],
        outputs=[real],
        attrs={"axis": 0},
    )
    return real

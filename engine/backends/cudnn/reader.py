"""From an INT8 ONNX graph to its fused layers.

Nothing is known of any network but the operators: Conv, Relu, Add, MaxPool, QuantizeLinear,
DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from engine.backends.cudnn.graph import Convolution, Head, Int8Graph, Layer, MaxPool, Tensor, Window
from engine.errors import EngineError
from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, import_graph, output_names, shape_of, type_of, value

_CONV, _ADD, _RELU, _POOL = "Conv", "Add", "Relu", "MaxPool"
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def read_int8_graph(network: onnx.ModelProto) -> Int8Graph:
    """Read a Q/DQ network whose outputs are the heads, and merge heads of the same input.

    Parameters
    ----------
    network
        One INT8 image [N, C, H, W] in, head tensors out, as `engine.backends.split`
        cuts it off. Weights are float behind QuantizeLinear and DequantizeLinear, or int8 behind
        DequantizeLinear.

    Raises
    ------
    EngineError
        When an operator or a pattern is none of those above; names the node and what is missing.
    """
    try:
        return _merge_heads(_Reader(import_graph(network)).read())
    except SurgeryError as error:
        raise EngineError(str(error)) from error


class _Reader:
    """Reads the graph from its image on."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._outputs = [tensor.name for tensor in graph.outputs]
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[str] = set()  # nodes, by what they make

    def read(self) -> Int8Graph:
        graph = self._graph
        if len(graph.inputs) != 1:
            raise EngineError(f"one image input expected, the graph has {len(graph.inputs)}")
        for node in graph.nodes:
            if node.op == _CONV:  # before others complain of what it leaves float
                self._dequantizer(node, node.inputs[1])
        (image,) = graph.inputs
        if type_of(image) != np.int8:
            raise EngineError(f"input {image.name!r} is {image.dtype}, not int8")
        place = {node.outputs[0].name: index for index, node in enumerate(graph.nodes)}
        # by their last nodes, for a residual may be made after the convolution that it is added to
        starts = sorted(
            (node for node in graph.nodes if node.op in (_CONV, _POOL)),
            key=lambda node: place[self._run_of(node)[-1].outputs[0].name],
        )
        layers: list[Layer] = [
            self._convolution(node) if node.op == _CONV else self._pool(node) for node in starts
        ]
        for node in graph.nodes:
            known = self._seen.intersection(output_names(node))
            if not known and value(graph, node.outputs[0]) is None:
                raise _refusal(
                    node,
                    "it is no part of a layer: Conv with Add and Relu, or MaxPool, between "
                    "QuantizeLinear nodes",
                )
        missing = [name for name in self._outputs if name not in self._tensors]
        if missing:
            raise EngineError(f"head tensor {missing[0]!r} is not the output of a convolution")
        heads = {name: Head(name, 0, self._tensors[name].channels) for name in self._outputs}
        return Int8Graph(image.name, self._tensors, tuple(layers), heads)

    def _convolution(self, node: gs.Node) -> Convolution:
        x, x_scale = self._dequantized(node, node.inputs[0])
        weight, weight_scales = self._weight(node, node.inputs[1])
        filters, channels = weight.shape[:2]
        if channels != self._tensors[x].channels:
            raise _refusal(node, "grouped convolutions are not")
        bias = np.zeros(filters, np.float32)
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            bias = self._constant(node, node.inputs[2]).astype(np.float32)
        residual, relu, run = None, False, self._run_of(node)
        for before, follower in pairwise(run):
            if follower.op == _ADD:
                (made,) = before.outputs
                (other,) = (tensor for tensor in follower.inputs if tensor is not made)
                residual, _ = self._dequantized(follower, other)
                if residual == self._graph.inputs[0].name:
                    raise _refusal(follower, "additions to the image are not")
                if _shape_of(follower, other) != _shape_of(follower, made):
                    raise _refusal(follower, "additions that broadcast are not")
            relu |= follower.op == _RELU
        y = self._finish(run)
        return Convolution(
            name=node.name or node.outputs[0].name,
            x=x,
            y=y,
            residual=residual,
            weight=weight,
            multiplier=(x_scale * weight_scales).astype(np.float32),
            bias=bias,
            window=_window(node, weight.shape[2:]),
            relu=relu,
        )

    def _pool(self, node: gs.Node) -> MaxPool:
        x, _ = self._dequantized(node, node.inputs[0])
        if len(node.outputs) > 1:
            raise _refusal(node, "poolings that also return indices are not")
        window = _window(node, node.attrs["kernel_shape"])
        if window.dilation != (1, 1):
            raise _refusal(node, "dilated poolings are not")
        y = self._finish([node])
        if self._tensors[y].scale is None:
            raise _refusal(node, "poolings without a quantised output are not")
        return MaxPool(node.name or node.outputs[0].name, x, y, window)

    def _finish(self, run: Sequence[gs.Node]) -> str:
        """The tensor that a layer ends in: quantised, or a head."""
        self._seen.update(node.outputs[0].name for node in run)
        (tensor,) = run[-1].outputs
        shape, head = _shape_of(run[0], tensor), tensor.name in self._outputs
        if head and not tensor.outputs:
            self._tensors[tensor.name] = Tensor(*shape, None)
            return str(tensor.name)
        if [reader.op for reader in tensor.outputs] == [_QUANTIZE] and not head:
            (node,) = tensor.outputs
            (y,) = output_names(node)
            self._seen.add(y)
            self._tensors[y] = Tensor(*shape, float(self._scale(node, axis_free=True)))
            return y
        names = ", ".join(map(describe, tensor.outputs)) or "nothing"
        raise _refusal(
            run[0],
            f"its result {tensor.name!r} goes to {names}; needed is one QuantizeLinear, or a head "
            "alone: no other layer may be left float",
        )

    def _dequantized(self, node: gs.Node, tensor: gs.Tensor) -> tuple[str, float]:
        """The INT8 tensor behind a DequantizeLinear that a node reads, and its scale."""
        source = self._dequantizer(node, tensor)
        stored = source.inputs[0]
        scale = float(self._scale(source, axis_free=True))
        if stored.name not in self._tensors:
            if stored.inputs:
                raise _refusal(node, f"its input {stored.name!r} is not the output of a layer")
            if isinstance(stored, gs.Constant):
                raise _refusal(node, f"its input {stored.name!r} is a constant")
            self._tensors[stored.name] = Tensor(*_shape_of(node, stored), scale)
        if self._tensors[stored.name].scale != scale:
            raise _refusal(
                node, f"{stored.name!r} is quantised with another scale than it is dequantised with"
            )
        return stored.name, scale

    def _dequantizer(self, node: gs.Node, tensor: gs.Tensor) -> gs.Node:
        """The DequantizeLinear behind an input of a node."""
        if [source.op for source in tensor.inputs] != [_DEQUANTIZE]:
            raise _refusal(
                node, f"its input {tensor.name!r} is left float; quantise it, without --keep-float"
            )
        self._seen.add(tensor.name)
        return tensor.inputs[0]

    def _weight(
        self, node: gs.Node, tensor: gs.Tensor
    ) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """The INT8 weight of a convolution and its scale for each filter."""
        source = self._dequantizer(node, tensor)
        stored = source.inputs[0]
        scales = self._scale(source)
        if [quantizer.op for quantizer in stored.inputs] == [_QUANTIZE]:
            (quantizer,) = stored.inputs
            self._seen.add(stored.name)
            floats = self._constant(node, quantizer.inputs[0]).astype(np.float32)
            steps = self._scale(quantizer).astype(np.float32)
            steps = steps.reshape(-1, *[1] * (floats.ndim - 1)) if steps.ndim else steps
            weight = np.clip(np.rint(floats / steps), -128, 127).astype(np.int8)
        else:
            weight = self._constant(node, stored)
        if weight.dtype != np.int8 or weight.ndim != 4:
            raise _refusal(node, f"its weight is {weight.dtype}{list(weight.shape)}")
        return weight, np.broadcast_to(scales, (len(weight),))

    def _scale(self, node: gs.Node, *, axis_free: bool = False) -> NDArray[np.float64]:
        """Scale of a QuantizeLinear or DequantizeLinear: one, or one for each output channel."""
        scale = self._constant(node, node.inputs[1]).astype(np.float64)
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            zero = self._constant(node, node.inputs[2])
            if zero.dtype != np.int8 or zero.any():
                raise _refusal(node, "zero points other than 0, or other types than int8, are")
        elif node.op == _QUANTIZE:
            raise _refusal(node, "without an int8 zero point its output is uint8, which is")
        if scale.size == 1:
            return scale.reshape(())
        if axis_free or node.attrs.get("axis", 1) != 0 or scale.ndim != 1:
            raise _refusal(node, "scales along other axes than a weight's filters are")
        return scale

    def _constant(self, node: gs.Node, tensor: gs.Tensor) -> NDArray[Any]:
        known = value(self._graph, tensor)
        if known is None:
            raise _refusal(node, f"its input {tensor.name!r} is no constant")
        return known

    def _run_of(self, node: gs.Node) -> list[gs.Node]:
        """A convolution or pooling, and behind the former an addition and a ReLU if they are."""
        run, rest = [node], [_ADD, _RELU] if node.op == _CONV else []
        while True:
            tensor = run[-1].outputs[0]
            kinds = [reader.op for reader in tensor.outputs]
            if len(kinds) != 1 or tensor.name in self._outputs or kinds[0] not in rest:
                return run
            rest = rest[rest.index(kinds[0]) + 1 :]
            run.append(tensor.outputs[0])


def _window(node: gs.Node, kernel: Sequence[int]) -> Window:
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise _refusal(node, "auto_pad is")
    stride, dilation = (tuple(node.attrs.get(name, (1, 1))) for name in ("strides", "dilations"))
    top, left, bottom, right = node.attrs.get("pads", [0, 0, 0, 0])
    return Window((kernel[0], kernel[1]), stride, dilation, (top, left, bottom, right))


def _shape_of(node: gs.Node, tensor: gs.Tensor) -> tuple[int, int, int]:
    _, *sizes = shape_of(tensor) or [None]
    if len(sizes) != 3 or None in sizes:
        raise _refusal(node, f"{tensor.name!r} has no fixed channels, height and width")
    channels, height, width = (size or 0 for size in sizes)
    return channels, height, width


def _refusal(node: gs.Node, why: str) -> EngineError:
    if why.endswith((" are", " is", " are not")):
        why = f"{why.removesuffix(' not')} not supported"
    return EngineError(f"INT8 kernels cannot run {describe(node)}: {why}")


def _merge_heads(graph: Int8Graph) -> Int8Graph:
    """Merge head convolutions that read the same tensor with the same geometry."""
    groups: dict[object, list[Convolution]] = {}
    for layer in graph.layers:
        if isinstance(layer, Convolution):
            head = graph.tensors[layer.y].scale is None and layer.residual is None
            key = (layer.x, layer.window, layer.relu) if head else layer.y
            groups.setdefault(key, []).append(layer)
    merged: dict[str, Convolution] = {}  # by the result of the last one, whose place it takes
    dropped: set[str] = set()
    tensors, heads = dict(graph.tensors), dict(graph.heads)
    for group in groups.values():
        if len(group) > 1:
            joined = _join(group)
            merged[group[-1].y] = joined
            dropped.update(layer.y for layer in group[:-1])
            place = tensors[group[0].y]
            tensors[joined.y] = replace(place, channels=len(joined.weight))
            first = 0
            for layer in group:
                heads[layer.y] = Head(joined.y, first, len(layer.weight))
                first += len(layer.weight)
                del tensors[layer.y]
    layers = [merged.get(one.y, one) for one in graph.layers if one.y not in dropped]
    return Int8Graph(graph.image, tensors, tuple(layers), heads)


def _join(group: Iterable[Convolution]) -> Convolution:
    layers = list(group)
    return replace(
        layers[0],
        name=" + ".join(layer.name for layer in layers),
        y=" + ".join(layer.y for layer in layers),
        weight=np.concatenate([layer.weight for layer in layers]),
        multiplier=np.concatenate([layer.multiplier for layer in layers]),
        bias=np.concatenate([layer.bias for layer in layers]),
    )

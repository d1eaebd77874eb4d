"""From an INT8 ONNX graph to its fused layers.

Nothing is known of any network but the operators: Conv, Relu, Add, MaxPool, QuantizeLinear,
DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engine.backends.cudnn.graph import Convolution, Head, Int8Graph, Layer, MaxPool, Tensor, Window
from engine.errors import EngineError
from graph_surgery.errors import SurgeryError
from graph_surgery.topology import Topology

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
        return _merge_heads(_Reader(Topology(network)).read())
    except SurgeryError as error:
        raise EngineError(str(error)) from error


class _Reader:
    """Reads the graph from its image on."""

    def __init__(self, graph: Topology) -> None:
        self._graph = graph
        self._nodes = graph.nodes
        self._outputs = [value.name for value in graph.model.graph.output]
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[int] = set()

    def read(self) -> Int8Graph:
        graph = self._graph
        inputs = [v.name for v in graph.model.graph.input if v.name not in graph.constants]
        if len(inputs) != 1:
            raise EngineError(f"one image input expected, the graph has {len(inputs)}")
        for index, node in enumerate(self._nodes):
            if node.op_type == _CONV:  # before others complain of what it leaves float
                self._dequantizer(index, node.input[1])
        image = inputs[0]
        if graph.dtype(image) != np.int8:
            raise EngineError(f"input {image!r} is {graph.dtype(image)}, not int8")
        starts = [i for i, node in enumerate(self._nodes) if node.op_type in (_CONV, _POOL)]
        # by their last nodes, for a residual may be made after the convolution that it is added to
        layers: list[Layer] = [
            self._convolution(index) if self._nodes[index].op_type == _CONV else self._pool(index)
            for index in sorted(starts, key=lambda index: self._run_of(index)[-1])
        ]
        self._check_rest()
        missing = [name for name in self._outputs if name not in self._tensors]
        if missing:
            raise EngineError(f"head tensor {missing[0]!r} is not the output of a convolution")
        heads = {name: Head(name, 0, self._tensors[name].channels) for name in self._outputs}
        return Int8Graph(image, self._tensors, tuple(layers), heads)

    def _convolution(self, index: int) -> Convolution:
        node = self._nodes[index]
        self._seen.add(index)
        x, x_scale = self._dequantized(index, node.input[0])
        weight, weight_scales = self._weight(index, node.input[1])
        filters, channels = weight.shape[:2]
        if channels != self._tensors[x].channels:
            raise self._refusal(index, "grouped convolutions are not")
        bias = np.zeros(filters, np.float32)
        if len(node.input) > 2 and node.input[2]:
            bias = self._constant(index, node.input[2]).astype(np.float32)
        tensor, residual, relu = node.output[0], None, False
        for follower in self._run_of(index)[1:]:
            if self._nodes[follower].op_type == _ADD:
                (other,) = (name for name in self._nodes[follower].input if name != tensor)
                residual, _ = self._dequantized(follower, other)
                if residual not in self._graph.producer:
                    raise self._refusal(follower, "additions to the image are not")
                if self._shape_of(follower, other) != self._shape_of(follower, tensor):
                    raise self._refusal(follower, "additions that broadcast are not")
            else:
                relu = True
            self._seen.add(follower)
            tensor = self._nodes[follower].output[0]
        y = self._finish(index, tensor)
        return Convolution(
            name=node.name or node.output[0],
            x=x,
            y=y,
            residual=residual,
            weight=weight,
            multiplier=(x_scale * weight_scales).astype(np.float32),
            bias=bias,
            window=self._window(index, weight.shape[2:]),
            relu=relu,
        )

    def _pool(self, index: int) -> MaxPool:
        node = self._nodes[index]
        self._seen.add(index)
        x, _ = self._dequantized(index, node.input[0])
        if len(node.output) > 1:
            raise self._refusal(index, "poolings that also return indices are not")
        attributes = _attributes(node)
        window = self._window(index, tuple(attributes["kernel_shape"]))
        if window.dilation != (1, 1):
            raise self._refusal(index, "dilated poolings are not")
        y = self._finish(index, node.output[0])
        if self._tensors[y].scale is None:
            raise self._refusal(index, "poolings without a quantised output are not")
        return MaxPool(node.name or node.output[0], x, y, window)

    def _finish(self, index: int, tensor: str) -> str:
        """The tensor that a layer ends in: quantised, or a head."""
        readers = self._graph.consumers.get(tensor, [])
        shape = self._shape_of(index, tensor)
        if tensor in self._outputs and not readers:
            self._tensors[tensor] = Tensor(*shape, None)
            return tensor
        if len(readers) == 1 and self._nodes[readers[0]].op_type == _QUANTIZE:
            node = self._nodes[readers[0]]
            scale = self._scale(readers[0], axis_free=True)
            if tensor not in self._outputs:
                self._seen.add(readers[0])
                self._tensors[node.output[0]] = Tensor(*shape, float(scale))
                return str(node.output[0])
        names = ", ".join(self._graph.describe(reader) for reader in readers) or "nothing"
        raise self._refusal(
            index,
            f"its result {tensor!r} goes to {names}; needed is one QuantizeLinear, or a head alone:"
            " no other layer may be left float",
        )

    def _dequantized(self, index: int, name: str) -> tuple[str, float]:
        """The INT8 tensor behind a DequantizeLinear that a node reads, and its scale."""
        source = self._dequantizer(index, name)
        tensor = self._nodes[source].input[0]
        scale = float(self._scale(source, axis_free=True))
        if tensor not in self._tensors:
            if tensor in self._graph.producer:
                raise self._refusal(index, f"its input {tensor!r} is not the output of a layer")
            if tensor in self._graph.constants:
                raise self._refusal(index, f"its input {tensor!r} is a constant")
            self._tensors[tensor] = Tensor(*self._shape_of(index, tensor), scale)
        if self._tensors[tensor].scale != scale:
            raise self._refusal(
                index, f"{tensor!r} is quantised with another scale than it is dequantised with"
            )
        return tensor, scale

    def _dequantizer(self, index: int, name: str) -> int:
        """The DequantizeLinear behind an input of a node."""
        source = self._graph.producer.get(name)
        if source is None or self._nodes[source].op_type != _DEQUANTIZE:
            raise self._refusal(
                index, f"its input {name!r} is left float; quantise it, without --keep-float"
            )
        self._seen.add(source)
        return source

    def _weight(self, index: int, name: str) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """The INT8 weight of a convolution and its scale for each filter."""
        source = self._dequantizer(index, name)
        stored = self._nodes[source].input[0]
        scales = self._scale(source)
        quantizer = self._graph.producer.get(stored)
        if quantizer is not None and self._nodes[quantizer].op_type == _QUANTIZE:
            self._seen.add(quantizer)
            value = self._constant(index, self._nodes[quantizer].input[0]).astype(np.float32)
            steps = self._scale(quantizer).astype(np.float32)
            steps = steps.reshape(-1, *[1] * (value.ndim - 1)) if steps.ndim else steps
            weight = np.clip(np.rint(value / steps), -128, 127).astype(np.int8)
        else:
            weight = self._constant(index, stored)
        if weight.dtype != np.int8 or weight.ndim != 4:
            raise self._refusal(index, f"its weight is {weight.dtype}{list(weight.shape)}")
        return weight, np.broadcast_to(scales, (len(weight),))

    def _scale(self, index: int, *, axis_free: bool = False) -> NDArray[np.float64]:
        """Scale of a QuantizeLinear or DequantizeLinear: one, or one for each output channel."""
        node = self._nodes[index]
        scale = self._constant(index, node.input[1]).astype(np.float64)
        if len(node.input) > 2 and node.input[2]:
            zero = self._constant(index, node.input[2])
            if zero.dtype != np.int8 or zero.any():
                raise self._refusal(
                    index, "zero points other than 0, or other types than int8, are"
                )
        elif node.op_type == _QUANTIZE:
            raise self._refusal(index, "without an int8 zero point its output is uint8, which is")
        attributes = _attributes(node)
        if scale.size == 1:
            return scale.reshape(())
        if axis_free or attributes.get("axis", 1) != 0 or scale.ndim != 1:
            raise self._refusal(index, "scales along other axes than a weight's filters are")
        return scale

    def _window(self, index: int, kernel: Sequence[int]) -> Window:
        attributes = _attributes(self._nodes[index])
        if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            raise self._refusal(index, "auto_pad is")
        values = [attributes.get(k, d) for k, d in (("strides", [1, 1]), ("dilations", [1, 1]))]
        stride, dilation = (tuple(value) for value in values)
        top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
        return Window((kernel[0], kernel[1]), stride, dilation, (top, left, bottom, right))

    def _constant(self, index: int, name: str) -> NDArray[Any]:
        value = self._graph.value(name)
        if value is None:
            raise self._refusal(index, f"its input {name!r} is no constant")
        return value

    def _run_of(self, index: int) -> list[int]:
        """A convolution or pooling, and behind the former an addition and a ReLU if they are."""
        run, rest = [index], [_ADD, _RELU] if self._nodes[index].op_type == _CONV else []
        while True:
            tensor = self._nodes[run[-1]].output[0]
            readers = self._graph.consumers.get(tensor, [])
            if len(readers) != 1 or tensor in self._outputs:
                return run
            kind = self._nodes[readers[0]].op_type
            if kind not in rest:
                return run
            rest = rest[rest.index(kind) + 1 :]
            run.append(readers[0])

    def _shape_of(self, index: int, tensor: str) -> tuple[int, int, int]:
        _, *sizes = self._graph.shape(tensor) or [None]
        if len(sizes) != 3 or None in sizes:
            raise self._refusal(index, f"{tensor!r} has no fixed channels, height and width")
        channels, height, width = (size or 0 for size in sizes)
        return channels, height, width

    def _check_rest(self) -> None:
        """Refuse what belongs to no layer."""
        wanted = set(self._graph.upstream(self._outputs))
        for index in sorted(wanted - self._seen):
            if self._graph.value(self._nodes[index].output[0]) is None:
                raise self._refusal(
                    index,
                    "it is no part of a layer: Conv with Add and Relu, or MaxPool, between "
                    "QuantizeLinear nodes",
                )

    def _refusal(self, index: int, why: str) -> EngineError:
        if why.endswith((" are", " is", " are not")):
            why = f"{why.removesuffix(' not')} not supported"
        return EngineError(f"INT8 kernels cannot run {self._graph.describe(index)}: {why}")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


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

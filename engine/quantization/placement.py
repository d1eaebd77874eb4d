"""Where quantisation goes: the rules of TensorRT's explicit quantisation, read off the graph.

Quantised are, in the part of the graph that the heads depend on,

* the data input and the weights of every convolution;
* of a residual addition the skip input alone: the convolution of the main branch, the addition
  and the ReLU behind it become one kernel, which takes INT8 for the skip and needs no rounding
  between its parts. The main branch is the input made by a convolution for this addition alone;
  where both are (the skip has a downsampling convolution), it is the one with more convolutions
  between the fork of the two branches and the addition;
* the input of every max pooling, so that it runs in INT8.

Nothing else is: not between a convolution and its ReLU, not behind the heads, not a bias. A tensor
with several such readers is quantised once. (Rules and reasons: "Working with quantized types" of
the TensorRT documentation; NVIDIA's ModelOpt places them the same way.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import onnx
from numpy.typing import NDArray

from engine.errors import EngineError
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.pattern import find_nms_node
from graph_surgery.topology import Topology

_NORMALISATION = "BatchNormalization"


@dataclass(frozen=True)
class Point:
    """A place where a node reads a quantised activation.

    Attributes
    ----------
    node
        Index of the node in the graph.
    input
        Index of its input.
    tensor
        Name of the tensor that it reads there.
    layer
        Index of the layer with which this point is quantised or left float: a convolution's own;
        for an addition and a pooling, that of the convolution whose kernel feeds it.
    """

    node: int
    input: int
    tensor: str
    layer: int


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Attributes
    ----------
    name
        Name for people, from its weight: ``model.layer1.4.0.conv1``, ``loc.0``.
    node
        Index of the node in the graph.
    weight
        Name of the initialiser.
    bias
        float32 [filters]; None where there is none, or it is no constant.
    """

    name: str
    node: int
    weight: str
    bias: NDArray[np.float32] | None = field(compare=False, repr=False)


@dataclass(frozen=True)
class Placement:
    """What of a detector is quantised.

    Attributes
    ----------
    image
        Name of the graph input.
    shape
        (channels, height, width) of an image.
    batch
        Fixed batch size; None when any will do.
    heads
        Tensors that NMS_OPT_TRT reads, loc then conf.
    layers
        Every convolution, in the order of the graph.
    points
        Every quantised activation input, in the order of the graph.
    floats
        Every tensor between image and heads, these included, but for those that one ReLU alone
        reads, perhaps behind the addition of something not negative: what of them is too large for
        a type is so behind the ReLU, too, or becomes 0.
    """

    image: str
    shape: tuple[int, int, int]
    batch: int | None
    heads: tuple[str, ...]
    layers: tuple[Layer, ...]
    points: tuple[Point, ...]
    floats: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The activations that need a scale, each once, in the order of the graph."""
        return tuple(dict.fromkeys(point.tensor for point in self.points))

    def match(self, patterns: Sequence[str]) -> frozenset[int]:
        """Choose layers by shell patterns of their names.

        Returns
        -------
        frozenset
            Indices into `layers`.

        Raises
        ------
        EngineError
            When a pattern matches no layer; names the nearest ones.
        """
        names = [layer.name for layer in self.layers]
        chosen: set[int] = set()
        for pattern in patterns:
            found = {i for i, name in enumerate(names) if fnmatchcase(name, pattern)}
            if not found:
                near = get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise EngineError(
                    f"no layer matches {pattern!r}; the nearest of {len(names)} are: "
                    f"{', '.join(near)}"
                )
            chosen |= found
        return frozenset(chosen)


def find_placement(model: onnx.ModelProto) -> Placement:
    """Apply the rules to a surgered FP32 detector.

    Raises
    ------
    EngineError
        When the graph has no NMS_OPT_TRT node, is quantised already, is not float32, has an
        unfolded batch norm or a convolution whose weight is no initialiser.
    """
    graph = Topology(model)
    nms = find_nms_node(graph.model)
    if nms is None:
        raise EngineError(f"the graph has no {OP_TYPE} node; run `graph-surgery nms` on it first")
    heads = tuple(nms.input[:-1])
    nodes = graph.upstream(heads)
    for index in nodes:
        node = graph.nodes[index]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise EngineError(f"the graph is quantised already ({node.name or node.op_type})")
        if node.op_type == _NORMALISATION:
            raise EngineError(
                f"batch norm {node.name or node.output[0]!r} is not folded into its convolution; "
                "export the model with 'export-onnx'"
            )
    convolutions = [index for index in nodes if graph.nodes[index].op_type == "Conv"]
    weights = [_weight(graph, index) for index in convolutions]
    biases = [_bias(graph, index) for index in convolutions]
    layers = tuple(map(Layer, _readable(weights), convolutions, weights, biases))
    points = tuple(_points(graph, nodes, {index: i for i, index in enumerate(convolutions)}))
    image, shape, batch = _image(graph, nodes)
    return Placement(image, shape, batch, heads, layers, points, tuple(_floats(graph, nodes)))


def _floats(graph: Topology, nodes: Iterable[int]) -> Iterator[str]:
    for index in nodes:
        for name in graph.nodes[index].output:
            known = name in graph.types and graph.dtype(name) == np.float32
            if known and graph.value(name) is None and not _ends_in_relu(graph, name):
                yield name


def _ends_in_relu(graph: Topology, name: str) -> bool:
    readers = [graph.nodes[reader] for reader in graph.consumers.get(name, [])]
    if [reader.op_type for reader in readers] == ["Add"]:
        others = [other for other in readers[0].input if other != name]
        return all(_not_negative(graph, other) for other in others) and _ends_in_relu(
            graph, readers[0].output[0]
        )
    return [reader.op_type for reader in readers] == ["Relu"]


def _not_negative(graph: Topology, name: str) -> bool:
    if name not in graph.producer:
        return False
    node = graph.nodes[graph.producer[name]]
    return node.op_type == "Relu" or (
        node.op_type == "MaxPool" and _not_negative(graph, node.input[0])
    )


def _image(graph: Topology, nodes: Iterable[int]) -> tuple[str, tuple[int, int, int], int | None]:
    read = {name for index in nodes for name in graph.nodes[index].input}
    images = [v for v in graph.model.graph.input if v.name in read - graph.constants.keys()]
    if len(images) != 1:
        raise EngineError(f"one image input expected, the heads depend on {len(images)}")
    name = images[0].name
    batch, *shape = graph.shape(name) or [None]
    if images[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise EngineError(f"input {name!r} is not float32; quantisation starts from an FP32 model")
    if len(shape) != 3 or None in shape:
        raise EngineError(f"input {name!r} has no fixed channels, height and width")
    channels, height, width = (size or 0 for size in shape)
    return name, (channels, height, width), batch


def _weight(graph: Topology, index: int) -> str:
    node = graph.nodes[index]
    name = node.input[1]
    if name not in {tensor.name for tensor in graph.model.graph.initializer}:
        raise EngineError(f"the weight of convolution {node.name or name!r} is no initialiser")
    if len(graph.consumers[name]) > 1:
        raise EngineError(f"weight {name!r} is shared by several convolutions")
    return str(name)


def _bias(graph: Topology, index: int) -> NDArray[np.float32] | None:
    name = "".join(graph.nodes[index].input[2:])
    return graph.value(name) if name else None


def _readable(weights: Sequence[str]) -> list[str]:
    """Weight names without the last part (``.weight``) and without the first parts of all."""
    names = [name.removesuffix(".weight").split(".") for name in weights]
    while all(len(name) > 1 and name[0] == names[0][0] for name in names):
        names = [name[1:] for name in names]
    return [".".join(name) for name in names]


def _points(graph: Topology, nodes: Iterable[int], layers: dict[int, int]) -> Iterator[Point]:
    for index in nodes:
        node = graph.nodes[index]
        if node.op_type == "Conv":
            yield Point(index, 0, node.input[0], layers[index])
        elif node.op_type == "MaxPool":
            source = _convolutions_behind(graph, node.input[0])
            if source:
                yield Point(index, 0, node.input[0], layers[source[0]])
        elif node.op_type == "Add":
            main = _main_branch(graph, index)
            if main is not None:
                source = _convolutions_behind(graph, node.input[main])
                yield Point(index, 1 - main, node.input[1 - main], layers[source[0]])


def _main_branch(graph: Topology, index: int) -> int | None:
    """Which input of an addition is the main branch of a residual block; None: it is no block."""
    inputs = graph.nodes[index].input
    if any(graph.value(name) is not None for name in inputs):
        return None
    lengths = {
        i: len(_convolutions_behind(graph, name))
        for i, name in enumerate(inputs)
        if name in graph.producer
        and graph.nodes[graph.producer[name]].op_type == "Conv"
        and len(graph.consumers[name]) == 1
    }
    return max(lengths, key=lambda i: lengths[i], default=None)


def _convolutions_behind(graph: Topology, name: str) -> list[int]:
    """Convolutions on the unbranched way that leads to a tensor, nearest first."""
    found = []
    while name in graph.producer and len(graph.consumers[name]) == 1:
        index = graph.producer[name]
        if graph.nodes[index].op_type == "Conv":
            found.append(index)
        elif graph.nodes[index].op_type not in ("Relu", "MaxPool"):
            break
        name = graph.nodes[index].input[0]
    return found

"""Where quantisation goes: the rules of TensorRT's explicit quantisation, read off the graph.

Quantised are, in the part of the graph that the heads depend on,

* the data input and the weights of every convolution;
* of a residual addition the skip input alone: the convolution of the main branch, the addition
  and the ReLU behind it become one kernel, which takes INT8 for the skip and needs no rounding
  between its parts. The main branch is the input made by a convolution for this addition alone;
  where both are (the skip has a downsampling convolution), it is the one with more convolutions
  between the fork of the two branches and the addition;
* the input of every max pooling, so that it runs in INT8;
* of a feature pyramid the input of an upsampling to the nearest, where its output is the skip input
  of an addition, which is quantised with the same scale: the upsampling copies steps, and its
  addition is the skip of a residual block to the lateral convolution.

Nothing else is: not between a convolution and its ReLU, not behind the heads, not a bias. A tensor
with several such readers is quantised once. (Rules and reasons: "Working with quantized types" of
the TensorRT documentation; NVIDIA's ModelOpt places them the same way.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from engine.errors import EngineError
from graph_surgery.errors import SurgeryError
from graph_surgery.graph import (
    downstream,
    import_graph,
    output_names,
    reads,
    shape_of,
    upstream,
    value,
)
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.pattern import find_nms_node

_NORMALISATION = "BatchNormalization"


@dataclass(frozen=True)
class Point:
    """A place where a node reads a quantised activation.

    Attributes
    ----------
    node
        Its node, by the name of what that makes.
    input
        Index of its input.
    tensor
        Name of the tensor that it reads there.
    layer
        Index of the layer with which this point is quantised or left float: a convolution's own;
        for an addition, that of the convolution whose kernel feeds it; for a pooling, that of the
        nearest convolution before it, or, where it reads the image, behind it; for an upsampling,
        that of the addition behind it.
    source
        Name of the tensor whose scale it has: that one, or what an upsampling made it of.
    """

    node: str
    input: int
    tensor: str
    layer: int
    source: str


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Attributes
    ----------
    name
        Name for people, from its weight: ``model.layer1.4.0.conv1``, ``loc.0``.
    node
        Its node, by the name of what that makes.
    weight
        Name of the constant; several layers may share it.
    bias
        float32 [filters]; None where there is none, or it is no constant.
    """

    name: str
    node: str
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
    mains
        What residual additions take from their main branch: quantised for ONNX Runtime on CPUs
        alone, whose integer additions take both sides so.
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
    mains: tuple[Point, ...]
    floats: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The activations that need a scale, each once, in the order of the graph."""
        return tuple(dict.fromkeys(point.source for point in self.points))

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
        When the graph has no NMS_OPT_TRT node, no convolution, is quantised already, is not
        float32, calls a function of the model in front of its heads, has an unfolded batch norm or
        a convolution whose weight is no constant.
    """
    try:
        return _place(import_graph(model))
    except SurgeryError as error:
        raise EngineError(str(error)) from error


def _place(graph: gs.Graph) -> Placement:
    nms = find_nms_node(graph)
    if nms is None:
        raise EngineError(f"the graph has no {OP_TYPE} node; run `graph-surgery nms` on it first")
    heads = nms.inputs[:-1]
    nodes = upstream(graph, heads)
    functions = {(function.domain, function.name) for function in graph.functions}
    for node in nodes:
        if (node.domain, node.op) in functions:
            raise EngineError(
                f"{node.op} is a function of the model, whose layers stay float: inline it, with "
                "'graph-surgery nms' on the model before its surgery"
            )
        quantised = node.op in ("QuantizeLinear", "DequantizeLinear")
        if quantised and value(graph, node.outputs[0]) is None:
            raise EngineError(f"the graph is quantised already ({node.name or node.op})")
        if node.op == _NORMALISATION:
            raise EngineError(
                f"batch norm {node.name or node.outputs[0].name!r} is not folded into its "
                "convolution; export the model with 'export-onnx'"
            )
    convolutions = [node for node in nodes if node.op == "Conv"]
    if not convolutions:
        raise EngineError("the heads depend on no convolution: there is nothing to quantise")
    names = [node.outputs[0].name for node in convolutions]
    weights = [_weight(graph, node) for node in convolutions]
    biases = [_bias(graph, node) for node in convolutions]
    layers = tuple(map(Layer, _readable(weights), names, weights, biases))
    points = tuple(_points(graph, nodes, {name: index for index, name in enumerate(names)}))
    made_by = {node.outputs[0].name: node for node in nodes}
    mains = []
    for point in points:
        if made_by[point.node].op == "Add":
            main = made_by[point.node].inputs[1 - point.input].name
            mains.append(replace(point, input=1 - point.input, tensor=main, source=main))
    return Placement(
        *_image(graph, nodes),
        tuple(tensor.name for tensor in heads),
        layers,
        points,
        tuple(mains),
        tuple(_floats(graph, nodes)),
    )


def _floats(graph: gs.Graph, nodes: Iterable[gs.Node]) -> Iterator[str]:
    for node in nodes:
        for tensor in node.outputs:
            known = tensor.dtype == np.float32 and value(graph, tensor) is None
            if known and not _ends_in_relu(tensor):
                yield tensor.name


def _ends_in_relu(tensor: gs.Tensor) -> bool:
    kinds = [reader.op for reader in tensor.outputs]
    if kinds == ["Add"]:
        (add,) = tensor.outputs
        others = [other for other in add.inputs if other is not tensor]
        return all(map(not_negative, others)) and _ends_in_relu(add.outputs[0])
    return kinds == ["Relu"]


def not_negative(tensor: gs.Tensor) -> bool:
    """Whether a ReLU made a tensor, or one of its steps out of what one made."""
    kinds = [node.op for node in tensor.inputs]
    source = copied(tensor)
    return kinds == ["Relu"] or (source is not None and not_negative(source))


def copied(tensor: gs.Tensor) -> gs.Tensor | None:
    """What a max pooling or an upsampling to the nearest took the values of a tensor from."""
    if len(tensor.inputs) != 1:
        return None
    (node,) = tensor.inputs
    source: gs.Tensor = node.inputs[0] if node.inputs else None
    return source if node.op == "MaxPool" or _is_nearest(node) else None


def _is_nearest(node: gs.Node) -> bool:
    return bool(node.op == "Resize" and node.attrs.get("mode", "nearest") == "nearest")


def _image(
    graph: gs.Graph, nodes: Iterable[gs.Node]
) -> tuple[str, tuple[int, int, int], int | None]:
    read = {tensor.name for node in nodes for tensor in reads(node)}
    images = [tensor for tensor in graph.inputs if tensor.name in read]
    if len(images) != 1:
        raise EngineError(f"one image input expected, the heads depend on {len(images)}")
    name = images[0].name
    batch, *shape = shape_of(images[0]) or [None]
    if images[0].dtype != np.float32:
        raise EngineError(f"input {name!r} is not float32; quantisation starts from an FP32 model")
    if len(shape) != 3 or None in shape:
        raise EngineError(f"input {name!r} has no fixed channels, height and width")
    channels, height, width = (size or 0 for size in shape)
    return name, (channels, height, width), batch


def _weight(graph: gs.Graph, conv: gs.Node) -> str:
    weight = conv.inputs[1]
    if value(graph, weight) is None:
        raise EngineError(f"the weight of convolution {conv.name or weight.name!r} is no constant")
    return str(weight.name)


def _bias(graph: gs.Graph, conv: gs.Node) -> NDArray[np.float32] | None:
    given = [tensor for tensor in conv.inputs[2:] if not tensor.is_empty()]
    return value(graph, given[0]) if given else None


def _readable(weights: Sequence[str]) -> list[str]:
    """Weight names without the last part (``.weight``) and without the first parts of all.

    The second convolution with the same weight has ``#2`` behind its name, and so on.
    """
    names = [name.removesuffix("_ordered").removesuffix(".weight").split(".") for name in weights]
    while all(len(name) > 1 and name[0] == names[0][0] for name in names):
        names = [name[1:] for name in names]
    count: Counter[str] = Counter()
    readable = []
    for name in map(".".join, names):
        count[name] += 1
        readable.append(f"{name}#{count[name]}" if count[name] > 1 else name)
    return readable


def _points(graph: gs.Graph, nodes: Iterable[gs.Node], layers: dict[str, int]) -> Iterator[Point]:
    for node in nodes:
        name, where = node.outputs[0].name, 0
        if node.op == "Conv":
            source = [name]
        elif node.op == "MaxPool":
            source = _nearest_convolution(graph, node)
        elif node.op == "Add" and (main := _main_branch(graph, node)) is not None:
            source, where = _convolutions_behind(node.inputs[main]), 1 - main
        else:
            continue
        if not source:
            continue
        layer, read = layers[source[0]], node.inputs[where]
        scaled = read
        if node.op == "Add" and read.inputs and _is_nearest(read.inputs[0]):
            scaled = read.inputs[0].inputs[0]
            yield Point(read.name, 0, scaled.name, layer, scaled.name)
        yield Point(name, where, read.name, layer, scaled.name)


def _nearest_convolution(graph: gs.Graph, pool: gs.Node) -> list[str]:
    """What the last convolution before a pooling makes; else the first behind it."""
    tensor = pool.inputs[0]
    while [node.op for node in tensor.inputs] in (["Relu"], ["MaxPool"], ["Add"]):
        (node,) = tensor.inputs
        main = _main_branch(graph, node) if node.op == "Add" else 0
        if main is None:
            break
        tensor = node.inputs[main]
    before = [node for node in upstream(graph, [tensor]) if node.op == "Conv"]
    behind = [node for node in downstream(graph, output_names(pool)) if node.op == "Conv"]
    return [node.outputs[0].name for node in (*before[-1:], *behind)][:1]


def _main_branch(graph: gs.Graph, add: gs.Node) -> int | None:
    """Which input of an addition is the main branch of a residual block; None: it is no block."""
    if any(value(graph, tensor) is not None for tensor in add.inputs):
        return None
    lengths = {
        i: len(_convolutions_behind(tensor))
        for i, tensor in enumerate(add.inputs)
        if [node.op for node in tensor.inputs] == ["Conv"] and len(tensor.outputs) == 1
    }
    return max(lengths, key=lambda i: lengths[i], default=None)


def _convolutions_behind(tensor: gs.Tensor) -> list[str]:
    """What convolutions make on the unbranched way that leads to a tensor, nearest first."""
    found = []
    while tensor.inputs and len(tensor.outputs) == 1:
        (node,) = tensor.inputs
        if node.op == "Conv":
            found.append(tensor.name)
        elif node.op not in ("Relu", "MaxPool"):
            break
        tensor = node.inputs[0]
    return found

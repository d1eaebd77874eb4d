"""Walking an ONNX graph by its tensors, and running a part of it in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError

Arrays = dict[str, NDArray[Any]]


def data_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors that a node reads, with those that its subgraphs take from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            inner = {value.name for value in (*graph.input, *graph.initializer)}
            for child in graph.node:
                yield from (name for name in data_inputs(child) if name not in inner)
                inner.update(child.output)


class Topology:
    """Producers and consumers of every tensor of a topologically sorted model.

    Attributes
    ----------
    model
        The model, with inferred shapes.
    nodes
        Its nodes; everywhere else a node is its index in this list.
    producer
        Node that makes a tensor.
    consumers
        Nodes that read a tensor.
    constants
        Initialisers and outputs of Constant nodes.
    types
        Type and shape of every tensor for which they are known.

    Raises
    ------
    SurgeryError
        When shape inference finds the model inconsistent.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        try:
            self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError) as error:
            raise SurgeryError(f"shape inference fails: {one_line(error)}") from error
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = {}
        self.constants: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        for index, node in enumerate(self.nodes):
            for name in data_inputs(node):
                self.consumers.setdefault(name, []).append(index)
            for name in node.output:
                self.producer[name] = index
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant_tensor(node)
        self.types = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}

    def upstream(self, names: Iterable[str], stop: Iterable[str] = ()) -> list[int]:
        """Nodes on which the tensors depend, sorted, not looking behind the tensors in `stop`."""
        stop, found, stack = set(stop), set(), list(names)
        while stack:
            name = stack.pop()
            index = self.producer.get(name)
            if name not in stop and index is not None and index not in found:
                found.add(index)
                stack.extend(data_inputs(self.nodes[index]))
        return sorted(found)

    def downstream(self, names: Iterable[str]) -> list[int]:
        """Nodes that depend on any of the tensors, sorted."""
        tainted, found = set(names), []
        for index, node in enumerate(self.nodes):
            if tainted.intersection(data_inputs(node)):
                found.append(index)
                tainted.update(name for name in node.output if name)
        return found

    def shape(self, name: str) -> list[int | None]:
        """Shape of a tensor, None for an unknown or symbolic size; [] when nothing is known."""
        dims = self.types[name].type.tensor_type.shape.dim if name in self.types else []
        return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor. Raises SurgeryError when shape inference found none."""
        kind = self.types[name].type.tensor_type.elem_type if name in self.types else 0
        if not kind:
            raise SurgeryError(f"the type of tensor {name!r} is not known")
        return onnx.helper.tensor_dtype_to_np_dtype(kind)

    def value(self, name: str) -> NDArray[Any] | None:
        """Value of a tensor that depends on constants alone; None for any other."""
        if name in self.constants:
            return onnx.numpy_helper.to_array(self.constants[name])
        nodes = self.upstream([name])
        reads = {read for index in nodes for read in data_inputs(self.nodes[index])}
        made = {made for index in nodes for made in self.nodes[index].output}
        if not nodes or not reads <= made | self.constants.keys():
            return None
        return Runner(self.part([], [name]))({})[name]

    def part(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """Cut out the model from some tensors to others."""
        extractor = onnx.utils.Extractor(self.model)
        for name in outputs:  # ONNX Runtime infers what shape inference could not
            extractor.value_infos.setdefault(name, onnx.ValueInfoProto(name=name))
        try:
            return extractor.extract_model(list(inputs), list(outputs))
        except ValueError as error:
            raise SurgeryError(f"cannot take the graph apart: {one_line(error)}") from error

    def describe(self, index: int) -> str:
        """Op type and name of a node, for messages."""
        node = self.nodes[index]
        return f"{node.op_type} {node.name or node.output[0]!r}"


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto:
    value = node.attribute[0]
    if value.name == "value":
        tensor: onnx.TensorProto = value.t
        return tensor
    return onnx.numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(value)))


def one_line(error: Exception) -> str:
    """First line of an exception's message; libraries append dumps to it."""
    return str(error).strip().partition("\n")[0][:200]


class Runner:
    """A model in ONNX Runtime on the CPU.

    Raises
    ------
    SurgeryError
        When ONNX Runtime rejects the model, or fails while running it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.outputs = [output.name for output in model.graph.output]
        try:
            self.session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the binding derives a dozen classes from Exception alone
            raise SurgeryError(f"ONNX Runtime rejects the model: {one_line(error)}") from error

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run and return every output by name."""
        try:
            values = self.session.run(self.outputs, dict(feeds))
        except Exception as error:
            raise SurgeryError(f"ONNX Runtime fails: {one_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

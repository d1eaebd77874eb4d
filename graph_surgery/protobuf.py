"""Models as files hold them: the types of their tensors, a part of them, running that part.

The proof of a surgery stands on this alone, not on the library that the surgery edits with: what
that might lose is then lost on one side only.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, version_converter

from graph_surgery.errors import SurgeryError

Arrays = dict[str, NDArray[Any]]

SMALL = 4096
"""Bytes of an initialiser up to which shape inference is given its value: shapes are that small."""


def one_line(error: Exception) -> str:
    """First line of an exception's message; libraries append dumps to it."""
    return str(error).strip().partition("\n")[0][:200]


def copy_fields(source: Message, target: Message, but: Container[str] = ()) -> None:
    """Copy all fields of a message, those that we do not know of too, but for those named."""
    for field, value in source.ListFields():
        if field.name in but:
            continue
        if hasattr(value, "MergeFrom"):
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of If, Loop and the like, not those within them."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors that a node reads, with those that its subgraphs take from outside."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        inner = {value.name for value in (*graph.input, *graph.initializer)}
        for child in graph.node:
            yield from (name for name in reads(child) if name not in inner)
            inner.update(child.output)
        yield from (value.name for value in graph.output if value.name not in inner)


def types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Type and shape of every tensor for which they are known: stated, or inferred without weights.

    Raises
    ------
    SurgeryError
        When shape inference finds the model inconsistent.
    """
    bare = onnx.ModelProto()
    copy_fields(model, bare, ("graph",))
    copy_fields(model.graph, bare.graph, ("initializer",))
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= SMALL:
            bare.graph.initializer.append(tensor)
        else:
            kind, where = tensor.data_type, TensorProto.EXTERNAL
            bare.graph.initializer.add(
                name=tensor.name, dims=tensor.dims, data_type=kind, data_location=where
            )
    try:
        graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise SurgeryError(f"shape inference fails: {one_line(error)}") from error
    return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}


def inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that a caller gives: IR version 3 lists the initialisers among them."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def part(
    model: onnx.ModelProto, given: Iterable[onnx.ValueInfoProto], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Cut out a model from some tensors to others; ONNX Runtime infers the types of the latter."""
    ends, nodes = {value.name: value for value in given}, model.graph.node
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    found: set[int] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        index = makers.get(name)
        if name not in ends and index is not None and index not in found:
            found.add(index)
            stack.extend(reads(nodes[index]))
    new = onnx.ModelProto()
    copy_fields(model, new, ("graph",))
    new.graph.name = model.graph.name
    new.graph.node.extend(nodes[index] for index in sorted(found))
    needed = {name for node in new.graph.node for name in reads(node)}.union(outputs)
    new.graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
    sparse = (t for t in model.graph.sparse_initializer if t.values.name in needed)
    new.graph.sparse_initializer.extend(sparse)
    new.graph.input.extend(ends.values())
    new.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(outputs))
    return new


def convert(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Convert a model of standard operators to an opset, with what the converter leaves out of it.

    Raises
    ------
    SurgeryError
        When the converter cannot.
    """
    try:
        converted = version_converter.convert_version(model, opset)
    except (RuntimeError, version_converter.ConvertError) as error:
        now = opset_of(model)
        raise SurgeryError(f"cannot convert opset {now} to {opset}: {one_line(error)}") from error
    new = onnx.ModelProto()
    copy_fields(model, new, ("graph", "opset_import"))
    copy_fields(converted.graph, new.graph)
    new.ir_version = max(model.ir_version, converted.ir_version)
    new.opset_import.extend(converted.opset_import)
    known = {name: node.metadata_props for node in model.graph.node for name in node.output}
    for node in new.graph.node:
        if not node.metadata_props:
            node.metadata_props.extend(known.get(node.output[0], ()))
    return new


def opset_of(model: onnx.ModelProto | onnx.FunctionProto) -> int:
    """Version of the standard operators."""
    versions: list[int] = [e.version for e in model.opset_import if e.domain in ("", "ai.onnx")]
    return max(versions, default=1)


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

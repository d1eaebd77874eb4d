"""Models as files hold them: the types of their tensors, a part of them, running that part.

The proof of a surgery stands on this alone, not on the library that the surgery edits with: what
that might lose is then lost on one side only.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, version_converter

from graph_surgery.errors import SurgeryError

Arrays = dict[str, NDArray[Any]]

SMALL = 4096
"""Bytes of an initialiser up to which shape inference is given its value: shapes are that small.
Only larger ones are kept outside of a model."""

LARGEST = 2**31 - 2**26
"""Bytes of initialisers that a model holds itself: a protobuf ends at 2 GiB, nodes need room."""

_ALIGNMENT = 4096
"""Of values in a data file: a page, so that ONNX Runtime maps them."""

_VALUES = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""Fields of a tensor that hold its values."""

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's session option for models that are not given as files."""


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
        if size(tensor) <= SMALL:
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


def type_of(value: onnx.ValueInfoProto) -> str:
    """Type and shape for people, as ``float32 [batch, 3, ?, 400]``."""
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value")).removesuffix("_type")
    tensor = value.type.tensor_type
    sizes = [
        str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in tensor.shape.dim
    ]
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    kind = {"float": "float32", "double": "float64"}.get(name, name)
    return f"{kind} [{', '.join(sizes)}]"


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


def size(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's values, as numpy holds them."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    found: int = math.prod(tensor.dims) * kind.itemsize
    return found


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Whether the values of a tensor lie in a file, where `graph_surgery.files.load` left them.

    Its ``location`` is an absolute path, so that they are found whatever the tensor is part of.
    """
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def data_file(tensor: onnx.TensorProto) -> tuple[Path, int]:
    """Where the values of a tensor outside begin: the file and the offset in it."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "location" not in entries or int(entries.get("offset", 0)) < 0:
        raise ValueError(f"{tensor.name!r} lies in a file, and does not say where")
    return Path(entries["location"]), int(entries.get("offset", 0))


def values_of(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Values of a tensor; those outside are mapped, not read.

    Raises
    ------
    SurgeryError
        When the file that holds them cannot be read.
    """
    if not is_outside(tensor):
        return onnx.numpy_helper.to_array(tensor)
    path, offset = data_file(tensor)
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    try:
        return np.memmap(path, kind, "r", offset, tuple(tensor.dims)).view(np.ndarray)
    except (OSError, ValueError) as error:
        raise SurgeryError(f"{path}: cannot read {tensor.name!r}: {one_line(error)}") from error


def content(values: NDArray[Any]) -> memoryview:
    """Bytes of an array."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def fits(model: onnx.ModelProto) -> bool:
    """Whether a model can be one protobuf, with its initialisers but those outside."""
    inside = (tensor for tensor in model.graph.initializer if not is_outside(tensor))
    return sum(map(size, inside)) <= LARGEST


def move_out(model: onnx.ModelProto, file: BinaryIO) -> onnx.ModelProto:
    """Copy a model, its large initialisers into a data file.

    Returns
    -------
    The copy. The ``location`` of what was moved is left out; see `set_location`.
    """
    new = onnx.ModelProto()
    copy_fields(model, new, ("graph",))
    copy_fields(model.graph, new.graph, ("initializer",))
    for tensor in model.graph.initializer:
        if size(tensor) <= SMALL or tensor.data_type == TensorProto.STRING or is_packed(tensor):
            new.graph.initializer.append(tensor)
            continue
        values = content(values_of(tensor))
        offset = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
        file.write(values)
        moved = new.graph.initializer.add(data_location=TensorProto.EXTERNAL)
        copy_fields(tensor, moved, (*_VALUES, "external_data", "data_location"))
        for key, value in (("offset", offset), ("length", len(values))):
            moved.external_data.add(key=key, value=str(value))
    return new


def is_packed(tensor: onnx.TensorProto) -> bool:
    """Whether several values of a tensor share a byte, which numpy's do not."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    return kind.startswith(("int4", "uint4", "float4", "int2", "uint2"))


def set_location(model: onnx.ModelProto, location: str) -> None:
    """Name the data file of a model that `move_out` made."""
    for tensor in filter(is_outside, model.graph.initializer):
        tensor.external_data.add(key="location", value=location)


def without_large(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a model that tools take which know neither files nor 2 GiB: for types, not for running.

    Returns
    -------
    A copy in which initialisers outside, and large ones where not all have room, are inputs; the
    model itself where there are none.
    """
    least = math.inf if fits(model) else SMALL
    large = [t for t in model.graph.initializer if is_outside(t) or size(t) > least]
    if not large:
        return model
    new, names = onnx.ModelProto(), {tensor.name for tensor in large}
    copy_fields(model, new, ("graph",))
    copy_fields(model.graph, new.graph, ("initializer",))
    new.graph.initializer.extend(t for t in model.graph.initializer if t.name not in names)
    listed = {value.name for value in model.graph.input}
    new.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in large
        if tensor.name not in listed
    )
    return new


def check(model: onnx.ModelProto) -> None:
    """Check a model with onnx.checker, types and shapes as well.

    Raises
    ------
    SurgeryError
        When it is invalid.
    """
    try:
        onnx.checker.check_model(without_large(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SurgeryError(one_line(error)) from error


def with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with the types and shapes of all its tensors, strictly inferred.

    Raises
    ------
    SurgeryError
        When it is inconsistent.
    """
    bare = without_large(model)
    try:
        new = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise SurgeryError(one_line(error)) from error
    if bare is not model:
        for field in ("initializer", "input"):
            new.graph.ClearField(field)
            getattr(new.graph, field).extend(getattr(model.graph, field))
    return new


@contextlib.contextmanager
def serialized(model: onnx.ModelProto) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Serialise a model for ONNX Runtime, whatever its size: its content, and session options.

    What lies outside is read from where it lies; what is too large lies in a temporary file, as
    long as the context lasts.
    """
    outside = [data_file(tensor)[0] for tensor in filter(is_outside, model.graph.initializer)]
    if not fits(model):
        with tempfile.TemporaryDirectory() as folder:
            with Path(folder, "data").open("w+b") as file:
                small = move_out(model, file)
            set_location(small, "data")
            yield small.SerializeToString(), {_DATA_FOLDER: folder}
    elif outside:
        folder = os.path.commonpath([path.parent for path in outside])
        new = onnx.ModelProto()
        new.CopyFrom(model)
        for tensor in filter(is_outside, new.graph.initializer):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = os.path.relpath(entry.value, folder)
        yield new.SerializeToString(), {_DATA_FOLDER: folder}
    else:
        yield model.SerializeToString(), {}


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
            with serialized(model) as (content, settings):
                for key, value in settings.items():
                    options.add_session_config_entry(key, value)
                self.session = ort.InferenceSession(
                    content, options, providers=["CPUExecutionProvider"]
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

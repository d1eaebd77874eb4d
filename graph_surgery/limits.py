"""What a model may not be, though onnx.checker takes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import TensorProto, TypeProto

from graph_surgery.errors import SurgeryError
from graph_surgery.protobuf import inputs, is_outside, is_packed, size

NODES = 1_000_000
"""Nodes after functions are inlined; detectors have thousands."""

ELEMENTS = 2**31
"""Of an input whose sizes are all fixed: 500 images of 1200 x 1200."""

_LISTS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_UNCOUNTED = (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128)
_TYPES = frozenset(TensorProto.DataType.values())


def check_limits(model: onnx.ModelProto) -> None:
    """Refuse what libraries fail at, or never end with.

    Raises
    ------
    SurgeryError
        When an element type is none, a tensor lacks values, an input has sizes that no image has,
        a Split contradicts itself, or functions call each other without end, or so that no memory
        holds what they are inlined to.
    """
    for message in _messages(model):
        kind = 0
        if isinstance(message, TensorProto):
            kind = message.data_type
        elif isinstance(message, TypeProto.Tensor):
            kind = message.elem_type
        if kind not in _TYPES:
            raise SurgeryError(f"a tensor has the element type {kind}, which ONNX does not know")
        if isinstance(message, TensorProto) and kind and not _is_filled(message):
            raise SurgeryError(f"tensor {message.name!r} has more or fewer values than its shape")
        if isinstance(message, onnx.NodeProto) and message.op_type == "Split":
            counts = [one.i for one in message.attribute if one.name == "num_outputs"]
            if counts not in ([], [len(message.output)]):  # onnx's shape inference aborts
                raise SurgeryError(f"Split {message.name!r} has other outputs than it says")
    for value in (*inputs(model), *model.graph.output):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.elem_type:
            raise SurgeryError(f"{value.name!r} has no element type")
    for value in inputs(model):
        dims = value.type.tensor_type.shape.dim
        sizes = [dim.dim_value for dim in dims if dim.HasField("dim_value")]
        if any(size < 0 for size in sizes) or math.prod(sizes) > ELEMENTS:
            text = ", ".join(
                str(dim.dim_value) if dim.HasField("dim_value") else "?" for dim in dims
            )
            raise SurgeryError(f"input {value.name!r} is [{text}], which no image is")
    _check_functions(model)


def _is_filled(tensor: TensorProto) -> bool:
    """Whether a tensor holds as many values as its shape says, where those are easily counted."""
    if is_outside(tensor) or is_packed(tensor) or tensor.data_type in _UNCOUNTED:
        return True
    if tensor.HasField("raw_data"):
        return bool(len(tensor.raw_data) == size(tensor))
    return bool(sum(len(getattr(tensor, name)) for name in _LISTS) == math.prod(tensor.dims))


def _messages(message: Message) -> Iterator[Message]:
    """Every message in a message, and that itself."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if isinstance(value, Iterable) else [value]:
                yield from _messages(one)


def _check_functions(model: onnx.ModelProto) -> None:
    bodies = {(one.domain, one.name): one for one in model.functions}
    counted: dict[tuple[str, str], float] = {}

    def nodes(part: Message) -> float:
        """Nodes of a graph or function once all that it calls is inlined."""
        return sum(
            1 + called((node.domain, node.op_type))
            for node in _messages(part)
            if isinstance(node, onnx.NodeProto)
        )

    def called(key: tuple[str, str]) -> float:
        if key in bodies and key not in counted:
            counted[key] = math.inf  # what calls itself, by whatever way, comes by here again
            counted[key] = nodes(bodies[key])
        return counted.get(key, 0)

    if (total := nodes(model.graph)) > NODES:
        how = "without end" if total == math.inf else f"to {total:.2g} nodes"
        raise SurgeryError(f"the model's functions call each other {how}; {NODES:,} are allowed")

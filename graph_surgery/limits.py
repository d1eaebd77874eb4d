"""What a model may not be, though onnx.checker takes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import TensorProto, TypeProto

from graph_surgery.errors import SurgeryError
from graph_surgery.protobuf import inputs

NODES = 1_000_000
"""Nodes after functions are inlined; detectors have thousands."""

ELEMENTS = 2**31
"""Of an input whose sizes are all fixed: 500 images of 1200 x 1200."""

_TYPES = frozenset(TensorProto.DataType.values())


def check_limits(model: onnx.ModelProto) -> None:
    """Refuse what libraries fail at, or never end with.

    Raises
    ------
    SurgeryError
        When an element type is none, an input has sizes that no image has, or functions call each
        other without end, or so that no memory holds what they are inlined to.
    """
    for message in _messages(model):
        kind = 0
        if isinstance(message, TensorProto):
            kind = message.data_type
        elif isinstance(message, TypeProto.Tensor):
            kind = message.elem_type
        if kind not in _TYPES:
            raise SurgeryError(f"a tensor has the element type {kind}, which ONNX does not know")
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

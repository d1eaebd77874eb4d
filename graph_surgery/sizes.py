"""Constants for what a network computes from sizes alone.

torchvision's exports compute the pads of an image and the sizes of an FPN node by node, though the
image's size is fixed: shape inference then knows the size of no feature map.
"""

from __future__ import annotations

import numpy as np
import onnx

from graph_surgery.errors import SurgeryError
from graph_surgery.heads import SHAPE_ONLY
from graph_surgery.protobuf import Runner, inputs, part, reads, types

_LOOSE = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression", "If", "Loop"})
"""Operators whose results have a size that hangs on values."""

_SIZED = frozenset({"Range", "ConstantOfShape"})
_SIZED_BY_OTHERS = frozenset(
    {"Reshape", "Slice", "Expand", "TopK", "Tile", "Pad", "Resize", "Split", "OneHot"}
)
"""Operators whose results have a size that is a value: of any input, of any but the first."""


def fold_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute once what a model's nodes read that hangs on no value of its inputs.

    Returns
    -------
    ModelProto
        A copy; the model itself where the inputs have no fixed sizes, or the sizes of all feature
        maps are known without it.
    """
    convs = [name for node in model.graph.node if node.op_type == "Conv" for name in node.output]
    if not all(map(_is_fixed, inputs(model))) or not convs:
        return model
    try:
        known = types(model)
    except SurgeryError:
        return model  # as below
    if all(name in known and _is_fixed(known[name]) for name in convs):
        return model
    moving = {value.name for value in inputs(model)}
    loose: set[str] = set()  # of a size that hangs on values
    computed, wanted = set(), dict[str, None]()
    for node in model.graph.node:
        read = set(reads(node))
        if node.op_type in SHAPE_ONLY and not loose & read:
            computed.update(node.output)
        elif moving & read or loose & read:
            moving.update(node.output)
            wanted.update((name, None) for name in reads(node) if name in computed)
            sizes = read if node.op_type in _SIZED else set(node.input[1:]) & read
            if (
                loose & read
                or node.op_type in _LOOSE
                or (node.op_type in (*_SIZED, *_SIZED_BY_OTHERS) and moving & sizes)
            ):
                loose.update(node.output)
        elif node.op_type != "Constant":
            computed.update(node.output)
    folded = list(wanted)
    feeds = {}
    for given in inputs(model):
        tensor = given.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[given.name] = np.zeros([size.dim_value for size in tensor.shape.dim], dtype)
    try:
        values = Runner(part(model, inputs(model), folded))(feeds) if folded else {}
    except SurgeryError:
        return model  # what is wrong with it shows when more of it is run
    new = onnx.ModelProto()
    new.CopyFrom(model)
    for node in list(new.graph.node):
        if values.keys() & set(node.output) and len(node.output) == 1:
            new.graph.node.remove(node)
            (name,) = node.output
            new.graph.initializer.append(onnx.numpy_helper.from_array(values[name], name))
    new.graph.ClearField("value_info")  # it may say that sizes are not known
    return new


def _is_fixed(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return bool(len(dims) and all(dim.dim_value > 0 for dim in dims))

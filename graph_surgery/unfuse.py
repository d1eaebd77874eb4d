"""Functions of a model, and operators of ONNX Runtime's optimiser, as standard operators again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from graph_surgery.errors import SurgeryError
from graph_surgery.nms_function import DOMAIN, OP_TYPE
from graph_surgery.protobuf import copy_fields, one_line, opset_of, types

FUSED = ("com.microsoft", "FusedConv")
LAID_OUT = "com.microsoft.nchwc"
"""Domain of operators whose tensors are blocked for one kind of CPU."""

PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
"""Attributes that `activation_params` holds, by activation."""


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inline the functions of a model; itself where there are none, or NMS_OPT_TRT is one.

    Raises
    ------
    SurgeryError
        When a function of another opset cannot be converted.
    """
    surgered = any((node.domain, node.op_type) == (DOMAIN, OP_TYPE) for node in model.graph.node)
    if surgered or not model.functions:
        return model
    opset, given = opset_of(model), model
    if any(opset_of(function) != opset for function in model.functions):
        model = onnx.ModelProto()  # converting them takes the types of what they read
        model.CopyFrom(given)
        ends = {value.name for value in (*model.graph.input, *model.graph.output)}
        del model.graph.value_info[:]
        model.graph.value_info.extend(v for n, v in types(model).items() if n not in ends)
    try:
        return onnx.inliner.inline_local_functions(model, convert_version=True)
    except RuntimeError as error:
        raise SurgeryError(
            f"the model's functions cannot be inlined: {one_line(error)}; export them in opset "
            f"{opset}, as the rest"
        ) from error


def unfuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write every FusedConv as convolution, addition and activation.

    Returns
    -------
    ModelProto
        A copy; the model itself where there is none.

    Raises
    ------
    SurgeryError
        For operators that were made for one kind of CPU.
    """
    if any(node.domain == LAID_OUT for node in model.graph.node):
        raise SurgeryError(
            f"ONNX Runtime's optimiser wrote the graph for one kind of CPU ({LAID_OUT}); looked "
            "for are standard operators: take the model from before, or one optimised with "
            "ORT_ENABLE_EXTENDED at most"
        )
    if not any((node.domain, node.op_type) == FUSED for node in model.graph.node):
        return model
    new = onnx.ModelProto()
    new.CopyFrom(model)
    del new.graph.node[:]
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken.update(tensor.name for tensor in model.graph.initializer)
    for node in model.graph.node:
        if (node.domain, node.op_type) == FUSED:
            new.graph.node.extend(_parts(node, taken))
        else:
            new.graph.node.append(node)
    return new


def _parts(node: onnx.NodeProto, taken: set[str]) -> Iterator[onnx.NodeProto]:
    own = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kind = own.get("activation", b"").decode()
    parameters = own.get("activation_params", [])

    def name(part: str) -> str:
        wanted = f"{node.output[0]}_{part}"
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        return wanted

    conv = onnx.NodeProto()
    copy_fields(node, conv, ("domain", "op_type", "input", "output", "attribute"))
    conv.op_type = "Conv"
    conv.attribute.extend(a for a in node.attribute if not a.name.startswith("activation"))
    conv.input.extend(node.input[:3])
    steps = [conv]
    if len(node.input) > 3:
        steps.append(helper.make_node("Add", ["", node.input[3]], []))
    if kind == "Clip":
        bounds = [name("min"), name("max")]
        for bound, value in zip(bounds, parameters, strict=True):
            tensor = numpy_helper.from_array(np.asarray(value, np.float32))
            yield helper.make_node("Constant", [], [bound], value=tensor)
        steps.append(helper.make_node("Clip", ["", *bounds], []))
    elif kind:
        values = zip(PARAMETERS.get(kind, ()), parameters, strict=True)
        steps.append(helper.make_node(kind, [""], [], **dict(values)))
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        made = name(step.op_type.lower()) if following else node.output[0]
        step.output.append(made)
        if following:
            following.input[0] = made
    yield from steps

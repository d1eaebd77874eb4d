"""Making the fixed batch of a network dynamic.

Most of a network takes any batch though the file says otherwise. What does not, in the exports of
torchvision: images are taken out of their batch of one, prepared one by one, and put together
again; and the sizes of an FPN's maps, and with them the batch, are constants.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_surgery.graph import export_graph, import_graph, namer, value
from graph_surgery.heads import SHAPE_ONLY
from graph_surgery.network import bypass
from graph_surgery.protobuf import inputs, types

BATCH = "batch"
"""Name of the size that becomes dynamic."""

_BY_VALUE = frozenset({"Sub", "Div", "Mul", "Add", "Cast", "Neg"})
"""Operators that do the same to an image [3, H, W] and to a batch of them."""


def free_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Make the fixed batch of a model dynamic.

    Whether every node takes another batch shows when it is run.

    Parameters
    ----------
    model
        Its images, and every output that depends on them, have the batch as their first size. It
        is not changed.
    batch
        The fixed size.

    Returns
    -------
    ModelProto
        A copy with the first size `BATCH` and inferred shapes.
    """
    edited = import_graph(model)
    if _keep_together(edited, batch) | _resize_any(edited, batch):
        model = export_graph(edited.cleanup(recurse_functions=False), model)
    new = onnx.ModelProto()
    new.CopyFrom(model)
    graph = new.graph
    for tensor in (*inputs(new), *graph.output):
        size = tensor.type.tensor_type.shape.dim[:1]
        if size and size[0].dim_value == batch:
            size[0].dim_param = BATCH
    graph.ClearField("value_info")
    ends = {tensor.name for tensor in (*graph.input, *graph.output)}
    graph.value_info.extend(known for name, known in types(new).items() if name not in ends)
    return new


def _keep_together(graph: gs.Graph, batch: int) -> bool:
    """Leave the images of a batch of one in it, from the input to the first convolution.

    Nothing is done where something else stands between. Whether the graph was changed.
    """
    if batch != 1:
        return False
    changed = False
    for image in graph.inputs:
        steps, tensor = [], image
        while True:
            readers = [node for node in tensor.outputs if node.op not in SHAPE_ONLY]
            if len(readers) != 1 or readers[0].op == "Conv":
                break
            steps.append(readers[0])
            tensor = readers[0].outputs[0]
        if not readers or readers[0].op != "Conv" or len(image.shape or []) != 4:
            continue
        what = [_passes(graph, node) for node in steps]
        if not any(one == "alone" for one in what) or None in what:
            continue
        changed, tensor = True, image
        for node, how in zip(steps, what, strict=True):
            if how in ("alone", "nothing"):
                bypass(graph, node, tensor)
                continue
            if how == "pad":
                pads = np.asarray(value(graph, node.inputs[1])).reshape(2, -1)
                whole = np.zeros((2, 4), np.int64)
                whole[:, 4 - pads.shape[1] :] = pads
                node.inputs[1] = gs.Constant(namer(graph)("pads"), whole.reshape(-1))
            tensor = node.outputs[0]
            tensor.shape = None
    return changed


def _passes(graph: gs.Graph, node: gs.Node) -> str | None:
    """What a node does to an image: only takes it out of a batch of one or puts it back ("alone").

    Others do "nothing", work on a "value", "pad", or "resize"; None: something else.
    """
    others = [value(graph, one) for one in node.inputs[1:] if not one.is_empty()]
    known = [one for one in others if one is not None]
    shape, found = list(node.inputs[0].shape or []), None
    if node.op == "Concat":
        alone = len(node.inputs) == 1 and node.attrs.get("axis") == 0
        found = "alone" if alone else None
    elif len(known) != len(others) or not isinstance(node.inputs[0], gs.Variable):
        found = None
    elif node.op in _BY_VALUE:
        found = "value" if all(one.ndim < 4 for one in known) else None
    elif node.op == "Pad":
        constant = node.attrs.get("mode", "constant") == "constant" and len(known) < 3
        if constant and len(known[0]) in (6, 8):
            found = "pad" if known[0].any() else "nothing"
    elif node.op == "Resize":
        if len(shape) == 4 and len(node.inputs) == 4 and len(known) == 1:
            found = "nothing" if known[0].tolist() == shape else "resize"
    elif _is_alone(node, [one.tolist() for one in known]):
        found = "alone"
    return found


def _is_alone(node: gs.Node, values: list[Any]) -> bool:
    """Whether a node takes the one image of a batch, or makes a batch of it."""
    first = node.attrs.get("axis", 0) == 0
    if node.op == "Split":
        return first and len(node.outputs) == 1
    if node.op in ("Squeeze", "Unsqueeze"):
        return (values[0] if values else node.attrs.get("axes")) in ([0], 0)
    if node.op == "Gather":
        return first and values == [0]
    if node.op == "Slice" and len(values) >= 3:
        starts, ends, axes, *steps = values
        return [starts, axes, *steps] in ([[0], [0]], [[0], [0], [1]]) and ends[0] >= 1
    return False


def _resize_any(graph: gs.Graph, batch: int) -> bool:
    """Give every Resize to constant sizes the batch of what it reads. Whether there was one."""
    name, found = namer(graph), False
    for node in [one for one in graph.nodes if one.op == "Resize" and len(one.inputs) == 4]:
        sizes = value(graph, node.inputs[3])
        if sizes is None or len(sizes) != 4 or sizes[0] != batch or "axes" in node.attrs:
            continue
        found, base = True, name(f"{node.outputs[0].name}_sizes")
        kept = gs.Variable(name(f"{base}_kept"), np.dtype(np.int64), [2])
        whole = gs.Variable(base, np.dtype(np.int64), [4])
        fixed = gs.Constant(name(f"{base}_fixed"), sizes[2:])
        span = {"start": 0, "end": 2}
        graph.nodes.append(gs.Node("Shape", kept.name, span, [node.inputs[0]], [kept]))
        graph.nodes.append(gs.Node("Concat", base, {"axis": 0}, [kept, fixed], [whole]))
        node.inputs[3] = whole
    return found

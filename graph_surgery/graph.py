"""Reading, walking and editing graphs with onnx-graphsurgeon.

Its nodes and tensors compare equal by their names and cannot be hashed: use names, `id` or `is`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from graph_surgery import protobuf
from graph_surgery.errors import SurgeryError
from graph_surgery.protobuf import Runner, copy_fields, is_outside, one_line, values_of

G_LOGGER.severity = G_LOGGER.CRITICAL + 1  # it prints to stdout; what is critical is raised, too


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Import a model with inferred shapes, without nodes on which no output depends.

    Parameters
    ----------
    model
        It is not changed, and must not be as long as the graph is used, which shares its weights.

    Raises
    ------
    SurgeryError
        When shape inference finds the model inconsistent, or the importer cannot read it or would
        pass over subgraphs.
    """
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.graphs:
                name = f"{node.op_type} {node.name or node.output[0]!r}"
                raise SurgeryError(
                    f"attribute {attribute.name!r} of {name} is a list of graphs: not supported"
                )
    known = protobuf.types(model)
    try:
        graph = gs.import_onnx(model)
    except Exception as error:  # the importer lets anything through
        raise SurgeryError(f"the graph cannot be read: {one_line(error)}") from error
    graph.import_domains = [
        onnx.helper.make_opsetid(e.domain, e.version) for e in model.opset_import
    ]
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Variable) and name in known:
            found = OnnxImporter.import_tensor(known[name])
            tensor.dtype, tensor.shape, tensor.type = found.dtype, found.shape, found.type
    return graph.cleanup(recurse_functions=False)


def export_graph(graph: gs.Graph, model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a model of an edited graph.

    All that graphsurgeon does not know, or loses, is taken from where the graph was imported.

    Parameters
    ----------
    graph
        New nodes may stand anywhere: each is placed before the first that reads what it makes.
        Inputs and outputs of other nodes may have changed, their attributes are those of `model`.
    model
        What the graph was imported from.
    """
    new = onnx.ModelProto()
    copy_fields(model, new, ("ir_version", "opset_import", "graph", "functions"))
    new.ir_version = graph.ir_version
    new.opset_import.extend(graph.import_domains)
    functions = {(function.domain, function.name): function for function in model.functions}
    new.functions.extend(
        functions.get((one.domain, one.name)) or OnnxExporter.export_function(one)
        for one in graph.functions
    )
    fields = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")
    copy_fields(model.graph, new.graph, (*fields, "quantization_annotation"))
    tensors = graph.tensors()
    made = {name: node for node in model.graph.node for name in node.output if name}
    lost = [node for node in model.graph.node if not tensors.keys() & set(node.output)]
    count = Counter(node.name for node in lost)  # what they make may have got another name
    named = {node.name: node for node in lost if count[node.name] == 1}
    for node in _sorted(graph.nodes):
        likely = (*map(made.get, output_names(node)), named.get(node.name))
        source = next((one for one in likely if one and one.op_type == node.op), None)
        new.graph.node.append(_node(node, source))

    constants = {name for name, tensor in tensors.items() if isinstance(tensor, gs.Constant)}
    needed = constants.union(*map(protobuf.reads, new.graph.node))  # by subgraphs, too
    sparse = {one.values.name: one for one in model.graph.sparse_initializer}
    new.graph.sparse_initializer.extend(sparse[name] for name in sparse if name in needed)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in dict.fromkeys([*stored, *tensors]):
        if name in constants and name not in sparse:
            new.graph.initializer.append(OnnxExporter.export_tensor_proto(tensors[name]))
        elif name in stored and name in needed:
            new.graph.initializer.append(stored[name])
    ends = [*graph.inputs, *graph.outputs]
    listed = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    known = {value.name: value for value in listed}
    new.graph.input.extend(_value(tensor, known) for tensor in graph.inputs)
    new.graph.output.extend(_value(tensor, known) for tensor in graph.outputs)
    shown = tensors.keys() - {tensor.name for tensor in ends} - (constants - known.keys())
    new.graph.value_info.extend(
        _value(tensors[name], known)
        for name in dict.fromkeys([*known, *tensors])
        if name in shown and tensors[name].dtype is not None
    )
    new.graph.quantization_annotation.extend(
        one for one in model.graph.quantization_annotation if one.tensor_name in tensors
    )
    return new


def _sorted(nodes: Iterable[gs.Node]) -> Iterator[gs.Node]:
    """Sort nodes, each behind those whose results it reads; otherwise the order stays."""
    ours = {id(node) for node in nodes}
    for node in nodes:
        stack = [node]
        while stack:
            missing = [
                maker
                for tensor in reads(stack[-1])
                for maker in tensor.inputs
                if id(maker) in ours and maker is not stack[-1]
            ]
            if missing:
                stack.append(missing[0])
                continue
            done = stack.pop()
            if id(done) in ours:
                ours.remove(id(done))
                yield done


def _node(node: gs.Node, source: onnx.NodeProto | None) -> onnx.NodeProto:
    new = onnx.NodeProto()
    copy_fields(source or OnnxExporter.export_node(node), new, ("input", "output"))
    new.input.extend(tensor.name for tensor in node.inputs)
    new.output.extend(tensor.name for tensor in node.outputs)
    return new


def _value(tensor: gs.Tensor, known: dict[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    """Type and shape of a tensor; the source's, if it says the same, for it says more."""
    new: onnx.ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, do_type_check=False)
    if (source := known.get(tensor.name)) is not None:
        before = OnnxImporter.import_tensor(source)
        same = (before.dtype, before.shape) == (tensor.dtype, tensor.shape)
        if same:
            new.ClearField("type")
        copy_fields(source, new, () if same else ("type",))
    return new


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Tensors that a node reads, itself and in its subgraphs."""
    yield from (tensor for tensor in node.inputs if not tensor.is_empty())
    for graph in node.subgraphs(recursive=True):
        for inner in graph.nodes:
            yield from (tensor for tensor in inner.inputs if not tensor.is_empty())


def upstream(
    graph: gs.Graph, tensors: Iterable[gs.Tensor], stop: Iterable[str] = ()
) -> list[gs.Node]:
    """Nodes on which tensors depend, in the order of the graph, not looking behind `stop`."""
    found, stack, ends = set(), list(tensors), set(stop)
    while stack:
        tensor = stack.pop()
        for node in tensor.inputs if tensor.name not in ends else ():
            if id(node) not in found:
                found.add(id(node))
                stack.extend(reads(node))
    return [node for node in graph.nodes if id(node) in found]


def downstream(graph: gs.Graph, names: Iterable[str]) -> list[gs.Node]:
    """Nodes that depend on any of the tensors, in the order of the graph."""
    tainted, found = set(names), []
    for node in graph.nodes:
        if tainted.intersection(tensor.name for tensor in reads(node)):
            found.append(node)
            tainted.update(output_names(node))
    return found


def output_names(node: gs.Node) -> list[str]:
    """Tensors that a node makes, without the outputs that are left out."""
    return [tensor.name for tensor in node.outputs if not tensor.is_empty()]


def value(graph: gs.Graph, tensor: gs.Tensor) -> NDArray[Any] | None:
    """Value of a tensor that depends on constants alone; None for any other."""
    if isinstance(tensor, gs.Constant):
        held = tensor._values  # .values would replace what the file holds
        if type(held) is LazyValues and is_outside(held.tensor):
            return values_of(held.tensor)
        return held if isinstance(held, np.ndarray) else np.asarray(held.load())
    nodes = upstream(graph, [tensor])
    made = {name for node in nodes for name in output_names(node)}
    leaves = [one for node in nodes for one in reads(node) if one.name not in made]
    if not nodes or not all(isinstance(one, gs.Constant) for one in leaves):
        return None
    part = gs.Graph(
        nodes=nodes,
        outputs=[tensor],
        opset=graph.opset,
        import_domains=graph.import_domains,
        functions=graph.functions,
        ir_version=graph.ir_version,
    )
    return Runner(gs.export_onnx(part, do_type_check=False))({})[tensor.name]


def fix(tensor: gs.Tensor, values: NDArray[Any]) -> None:
    """Make a tensor a constant, or give a constant other values; for all that read it."""
    if isinstance(tensor, gs.Variable):
        tensor.inputs.clear()
        tensor.to_constant(values)
    else:
        tensor.values = values
        tensor.data_location = None  # no longer outside, if it was


def namer(graph: gs.Graph) -> Callable[[str], str]:
    """Make a function that gives new tensors the names wanted, or longer ones if they are taken."""
    parts = [graph, *graph.subgraphs(recursive=True)]
    taken = {name for part in parts for name in part.tensors()}

    def name(wanted: str) -> str:
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        return wanted

    return name


def shape_of(tensor: gs.Tensor) -> list[int | None]:
    """Shape of a tensor, None for an unknown or symbolic size; [] when nothing is known."""
    return [size if isinstance(size, int) else None for size in tensor.shape or []]


def type_of(tensor: gs.Tensor) -> np.dtype[Any]:
    """Element type of a tensor. Raises SurgeryError when shape inference found none."""
    if not isinstance(tensor.dtype, np.dtype):
        raise SurgeryError(f"the type of tensor {tensor.name!r} is not known")
    return tensor.dtype


def describe(node: gs.Node) -> str:
    """Op type and name of a node, for messages."""
    return f"{node.op} {node.name or node.outputs[0].name!r}"

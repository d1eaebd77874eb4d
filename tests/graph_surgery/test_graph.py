"""Graphs in and out of graphsurgeon: nothing is lost or printed, new nodes find their place."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import export_graph, import_graph, value
from graph_surgery.protobuf import part
from graph_surgery.replace import insert_nms
from tests.support.graphs import UNCAPPED, detector, run

BRANCHES = """
<ir_version: 10, opset_import: ["": 18, "mine": 1]>
g (float[N, 4] x, bool flag) => (float[N, 4] y, float[N, 4] seen)
<float[4] bias = {1, 2, 3, 4}, float[4] inner = {5, 6, 7, 8}>
{
  a = Relu (x)
  y = If (flag) <
    then_branch = t () => (float[N, 4] one) { b = Mul (a, inner) one = Add (b, bias) },
    else_branch = e () => (float[N, 4] two) { two = Sub (a, inner) }
  >
  seen = mine.Twice (a)
}
<domain: "mine", opset_import: ["": 18]> Twice (v) => (w) { w = Add (v, v) }
"""


def branches() -> onnx.ModelProto:
    """Subgraphs that capture, a function, and all that graphsurgeon is known to lose."""
    model = parser.parse_model(BRANCHES)
    graph = model.graph
    model.producer_name, model.producer_version = "someone", "3"
    model.domain, model.model_version, model.doc_string = "whose", 7, "why"
    model.metadata_props.add(key="input_scale", value="0.5")
    graph.doc_string = "what"
    graph.metadata_props.add(key="of", value="the graph")
    graph.quantization_annotation.add(tensor_name="a").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="bias"
    )
    node = graph.node[0]
    node.doc_string, node.overload = "rectifies", ""
    node.metadata_props.add(key="layer", value="first")
    tensors = [numpy_helper.from_array(np.float32([1]), "one")]
    node.attribute.append(helper.make_attribute("tensors", tensors))
    node.attribute.append(helper.make_attribute("none", [], attr_type=onnx.AttributeProto.INTS))
    node.attribute.append(helper.make_attribute("type", helper.make_tensor_type_proto(1, [2])))
    graph.input[0].doc_string = "an image"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 4]))
    graph.value_info[0].metadata_props.add(key="of", value="a tensor")
    return model


def test_nothing_is_lost_and_nothing_printed(capfd):
    model = branches()
    for node in model.graph.node:
        node.name = "same"  # graphsurgeon warns of it, as of attributes that it does not know
    before = model.SerializeToString(deterministic=True)
    assert export_graph(import_graph(model), model) == model
    assert model.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")


def test_what_a_subgraph_captures_stays_and_the_rest_goes():
    model = branches()
    model.graph.node.add(op_type="Neg", input=["a"], output=["unread"])
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "loose"))
    graph = import_graph(model)
    graph.outputs = graph.outputs[:1]
    new = export_graph(graph.cleanup(recurse_functions=False), model)
    assert [node.output[0] for node in new.graph.node] == ["a", "y"]
    assert [tensor.name for tensor in new.graph.initializer] == ["bias", "inner"]
    del new.graph.node[0].attribute[:]
    run(new, {"x": np.ones((1, 4), np.float32), "flag": np.array(True)})


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("start", ["x", "a"])
def test_a_part_follows_names_that_subgraphs_capture(start, flag):
    model = branches()
    del model.graph.node[0].attribute[:]
    feeds = {"x": np.float32([[-1, 2, -3, 4]]), "flag": np.array(flag)}
    whole = run(model, feeds)[0]
    given = [model.graph.value_info[0] if start == "a" else model.graph.input[0]]
    cut = part(model, [*given, model.graph.input[1]], ["y"])
    assert len(cut.graph.node) == (1 if start == "a" else 2)
    feeds = {start: feeds["x"].clip(0) if start == "a" else feeds["x"], "flag": feeds["flag"]}
    np.testing.assert_array_equal(run(cut, feeds)[0], whole)


def test_new_nodes_stand_before_what_reads_them():
    model = branches()
    graph = import_graph(model)
    twice = graph.nodes[-1]
    made = [gs.Variable(name) for name in ("first", "second")]
    graph.layer(op="Neg", inputs=[made[0]], outputs=[made[1]])
    graph.layer(op="Abs", inputs=[twice.inputs[0]], outputs=[made[0]])
    twice.inputs[0] = made[1]
    new = export_graph(graph, model)
    assert [node.op_type for node in new.graph.node] == ["Relu", "If", "Abs", "Neg", "Twice"]
    del new.graph.node[0].attribute[:]
    x = np.float32([[-1, 2, -3, 4]])
    np.testing.assert_array_equal(run(new, {"x": x, "flag": np.array(True)})[1], -2 * x.clip(0))


def test_values_of_constant_expressions():
    graph = import_graph(
        parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[N, 2] x) => (float[N, 2] y) <float[2] c = {3, 5}>
        { f = Constant <value_float = 0.1> () d = Mul (c, f) e = Neg (d) y = Add (x, e) }
        """)
    )
    tensors = graph.tensors()
    assert value(graph, tensors["f"]) == np.float32(0.1)
    np.testing.assert_array_equal(
        value(graph, tensors["e"]), -np.float32([3, 5]) * np.float32(0.1), strict=True
    )
    assert value(graph, tensors["x"]) is None
    assert value(graph, tensors["y"]) is None


def test_a_list_of_graphs_is_refused_by_name():
    model = detector(UNCAPPED)
    node = helper.make_node("Tell", ["image"], ["told"], "tell", domain="mine", of=[model.graph])
    model.graph.node.append(node)
    with pytest.raises(SurgeryError, match="attribute 'of' of Tell 'tell' is a list of graphs"):
        insert_nms(model)


@pytest.mark.parametrize("batch", ["fixed", "dynamic"])
def test_the_proof_notices_what_the_importer_loses(exported, monkeypatch, batch):
    """The old side does not pass through it."""
    model = onnx.load(exported) if batch == "dynamic" else detector(UNCAPPED)
    real = gs.import_onnx

    def lossy(given):
        graph = real(given)
        conv = next(node for node in graph.nodes if node.op == "Conv")
        conv.inputs[1].values = np.zeros_like(conv.inputs[1].values)
        return graph

    assert insert_nms(model).modified
    monkeypatch.setattr(gs, "import_onnx", lossy)
    with pytest.raises(SurgeryError, match="network's outputs change"):
        insert_nms(model)

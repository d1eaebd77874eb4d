"""Habits of other exporters: the same detections as before, whatever the graph is written like."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from graph_surgery.errors import SurgeryError
from graph_surgery.replace import insert_nms
from tests.support.graphs import (
    IMAGE,
    UNCAPPED,
    assert_same_detections,
    detector,
    rows_of_three,
    run,
)

PLAIN = replace(UNCAPPED, opset=18)
NORMS = replace(PLAIN, norms=True)


def nodes_of(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def check(model: onnx.ModelProto) -> list[str]:
    """Detections before and after the surgery; the operators of the network then."""
    onnx.checker.check_model(model)
    new = insert_nms(model).model
    image = np.random.default_rng(4).normal(size=(1, 3, IMAGE, IMAGE)).astype(np.float32)
    expected = rows_of_three(*run(model, {"image": image})[:3])
    detections, count = run(new, {"image": image})[:2]
    assert count[0] > 0
    assert_same_detections(detections[0, : count[0], 1:], expected)
    return [node.op_type for node in new.graph.node]


def insert_before(model: onnx.ModelProto, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
    place = list(model.graph.node).index(node)
    for one in reversed(new):
        model.graph.node.insert(place, one)


def test_an_identity_between_convolution_and_batch_norm():
    model = detector(NORMS)
    for index, norm in enumerate(nodes_of(model, "BatchNormalization")):
        names = [norm.input[0], f"same{index}", f"again{index}"]
        identities = [helper.make_node("Identity", [a], [b]) for a, b in pairwise(names)]
        norm.input[0] = names[-1]
        insert_before(model, norm, *identities)
    assert "BatchNormalization" not in check(model)


def test_an_identity_that_others_read_keeps_its_batch_norm():
    model = detector(NORMS)
    norm = nodes_of(model, "BatchNormalization")[0]
    insert_before(model, norm, helper.make_node("Identity", [norm.input[0]], ["same"]))
    norm.input[0] = "same"
    model.graph.output.append(helper.make_tensor_value_info("same", 1, [1, 12, 8, 8]))
    assert check(model).count("BatchNormalization") == 1


def test_folded_convolutions_without_names_keep_their_strides():
    model = detector(NORMS)
    for node in model.graph.node:
        node.name = ""
    assert "BatchNormalization" not in check(model)


def test_convolutions_that_share_weights_are_folded_each_by_itself():
    model = detector(NORMS)
    convs = nodes_of(model, "Conv")[1:3]
    convs[1].input[1] = convs[0].input[1]
    assert "BatchNormalization" not in check(model)


@pytest.mark.parametrize("op", ["Identity", "Cast", "Constant"])
def test_folded_weights_behind_a_node(op):
    model = detector(NORMS)
    for conv in nodes_of(model, "Conv"):
        store_behind(model, conv.input[1], op)
    assert "BatchNormalization" not in check(model)


def store_behind(model: onnx.ModelProto, name: str, op: str) -> None:
    """Let a node make what was an initialiser."""
    graph = model.graph
    stored = next(tensor for tensor in graph.initializer if tensor.name == name)
    value = numpy_helper.to_array(stored)
    graph.initializer.remove(stored)
    if op == "Constant":
        node = helper.make_node("Constant", [], [name], value=stored)
    else:
        attributes = {"to": onnx.TensorProto.FLOAT} if op == "Cast" else {}
        node = helper.make_node(op, [f"{name}_stored"], [name], **attributes)
        kept = value.astype(np.float16) if op == "Cast" else value
        graph.initializer.append(numpy_helper.from_array(kept, f"{name}_stored"))
    graph.node.insert(0, node)


def test_a_function_in_front_of_the_heads_is_inlined():
    model = detector(PLAIN)
    conv, relu = model.graph.node[:2]
    names = ["image", *conv.input[1:]]
    imports = [helper.make_opsetid("", 18)]
    function = helper.make_function("mine", "Stem", names, relu.output, [conv, relu], imports)
    call = helper.make_node("Stem", names, relu.output, domain="mine")
    del model.graph.node[:2]
    model.graph.node.insert(0, call)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    before = model.SerializeToString(deterministic=True)
    kinds = check(model)
    assert kinds.count("Conv") == 9
    assert "Stem" not in kinds
    assert "the model's functions were inlined" in insert_nms(model).changes
    assert model.SerializeToString(deterministic=True) == before


def test_concats_of_concats_of_heads():
    model = detector(PLAIN)
    joins = [node for node in nodes_of(model, "Concat") if node.attribute[0].i == 2]
    for index, join in enumerate(joins[:2]):
        one, two = f"alone{index}", f"both{index}"
        insert_before(
            model,
            join,
            helper.make_node("Concat", join.input[:1], [one], axis=2),
            helper.make_node("Concat", [one, join.input[1]], [two], axis=2),
        )
        join.input[:] = [two, join.input[2]]
    check(model)


def test_names_that_the_surgery_wants():
    """The priors can do without theirs; the outputs cannot."""
    model = detector(PLAIN)
    first = next(iter(nodes_of(model, "Relu")))
    for name in ("nms_priors", "detections"):
        for node in model.graph.node:
            node.input[:] = [name if read == first.output[0] else read for read in node.input]
        first.output[0] = name
        if name == "nms_priors":
            check(model)
    with pytest.raises(SurgeryError, match="has a tensor 'detections' of its own: rename it"):
        insert_nms(model)


def test_strings_beside_the_detections_stay():
    model = detector(PLAIN)
    names = helper.make_node("Constant", [], ["names"], value_strings=["cat", "dog"])
    model.graph.node.append(names)
    model.graph.output.append(helper.make_tensor_value_info("names", onnx.TensorProto.STRING, [2]))
    result = insert_nms(model)
    assert "the batch, fixed at 1, became dynamic" in result.changes
    image = np.ones((2, 3, IMAGE, IMAGE), np.float32)
    assert run(result.model, {"image": image})[2].tolist() == ["cat", "dog"]


def test_postprocessing_of_the_first_image_alone_is_refused():
    """A batch of any size goes in, the detections of one image come out."""
    model = detector(replace(PLAIN, batch="N"))
    for node in nodes_of(model, "Squeeze"):
        node.op_type, node.input[1] = "Gather", "first"
    first = numpy_helper.from_array(np.int64(0), "first")
    model.graph.initializer.append(first)
    with pytest.raises(SurgeryError, match="of 1 images for a batch of 7: its postprocessing"):
        insert_nms(model)

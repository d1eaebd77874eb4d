"""The network in front of the heads: batch norms are folded, the batch becomes dynamic."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

import graph_surgery.replace
import graph_surgery.samples
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


def with_fixed_reshape(model: onnx.ModelProto) -> onnx.ModelProto:
    """Send the image through a Reshape whose constant holds the batch."""
    graph = model.graph
    shape = onnx.numpy_helper.from_array(np.array([1, 3, IMAGE, IMAGE]), "image_shape")
    graph.initializer.append(shape)
    for node in graph.node:
        node.input[:] = ["reshaped" if name == "image" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Reshape", ["image", "image_shape"], ["reshaped"]))
    return model


@pytest.mark.parametrize(
    "variant",
    [replace(UNCAPPED, norms=True), replace(UNCAPPED, norms=True, opset=17)],
    ids=["opset 10", "opset 17"],
)
def test_batch_norms_are_folded_and_the_batch_becomes_dynamic(variant):
    model = detector(variant)
    result = insert_nms(model)
    assert "3 batch norms were folded into their convolutions" in result.changes
    assert "the batch, fixed at 1, became dynamic" in result.changes
    assert "BatchNormalization" not in {node.op_type for node in result.model.graph.node}
    images = np.random.default_rng(8).normal(size=(3, 3, IMAGE, IMAGE)).astype(np.float32)
    detections, count = run(result.model, {"image": images})
    assert count.min() > 0
    for number, image in enumerate(images):
        expected = rows_of_three(*run(model, {"image": image[None]}))
        assert_same_detections(detections[number, : count[number], 1:], expected)


def test_a_batch_norm_that_is_not_a_convolutions_own_stays():
    """One stands behind a ReLU, one shares its convolution with a reader, some are float16."""
    model = detector(replace(UNCAPPED, norms=True))
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    tap = helper.make_node("Identity", [norm.input[0]], ["tap"])
    model.graph.node.append(tap)
    model.graph.output.append(helper.make_tensor_value_info("tap", 1, [1, 12, 8, 8]))
    half = detector(replace(UNCAPPED, norms=True, half=True, opset=13))
    for before, kept in ((detector(UNCAPPED), 1), (model, 1), (half, 3)):
        result = insert_nms(before)
        assert [n.op_type for n in result.model.graph.node].count("BatchNormalization") == kept
        image = np.random.default_rng(1).normal(size=(1, 3, IMAGE, IMAGE)).astype(np.float32)
        detections, count = run(result.model, {"image": image})[:2]
        expected = rows_of_three(*run(before, {"image": image})[:3])
        assert_same_detections(detections[0, : count[0], 1:], expected)


def test_a_network_that_computes_with_its_batch_keeps_it():
    model = with_fixed_reshape(detector(UNCAPPED))
    result = insert_nms(model)
    assert any("batch stays fixed at 1: with another," in change for change in result.changes)
    assert result.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    image = np.random.default_rng(1).normal(size=(1, 3, IMAGE, IMAGE)).astype(np.float32)
    detections, count = run(result.model, {"image": image})
    assert count[0] > 0
    assert_same_detections(
        detections[0, : count[0], 1:], rows_of_three(*run(model, {"image": image}))
    )


@pytest.mark.parametrize("kind", ["scalar", "true or false", "of variable length"])
def test_an_output_that_is_no_batch_does_not_end_the_surgery(kind):
    """The batch stays fixed where other outputs depend on it, and the file says the same."""
    model = detector(UNCAPPED)
    first = next(node for node in model.graph.node if node.op_type == "Conv").output[0]
    zero = onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")
    model.graph.initializer.append(zero)
    nodes = {
        "scalar": [helper.make_node("ReduceMax", [first], ["extra"], keepdims=0)],
        "true or false": [helper.make_node("Greater", [first, "zero"], ["extra"])],
        "of variable length": [
            helper.make_node("Greater", [first, "zero"], ["positive"]),
            helper.make_node("NonZero", ["positive"], ["extra"]),
        ],
    }
    model.graph.node.extend(nodes[kind])
    model.graph.output.append(onnx.ValueInfoProto(name="extra"))
    model = onnx.shape_inference.infer_shapes(model)
    result = insert_nms(model)
    free = any("became dynamic" in change for change in result.changes)
    assert free == (kind == "true or false")
    assert free != any("stays fixed" in change for change in result.changes)
    image = np.random.default_rng(1).normal(size=(1, 3, IMAGE, IMAGE)).astype(np.float32)
    np.testing.assert_allclose(
        run(result.model, {"image": image})[2], run(model, {"image": image})[3], atol=1e-5
    )


@pytest.mark.parametrize("mistake", ["scale", "shift"])
def test_the_proof_notices_a_network_folded_wrongly(monkeypatch, mistake):
    fold = graph_surgery.replace.fold_batch_norms

    def fold_wrongly(graph):
        fold(graph)
        for node in graph.nodes:
            if node.op == "Conv":
                constant = node.inputs[2 if mistake == "shift" else 1]
                constant.values = constant.values * np.float32(1.01)

    monkeypatch.setattr(graph_surgery.replace, "fold_batch_norms", fold_wrongly)
    with pytest.raises(SurgeryError, match="network's outputs change"):
        insert_nms(detector(replace(UNCAPPED, norms=True)))

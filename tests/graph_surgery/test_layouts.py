"""Channels in other orders than the operator's: put in order, proved, or refused by name."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

import graph_surgery.replace
import graph_surgery.verify
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from graph_surgery.errors import SurgeryError
from graph_surgery.replace import insert_nms
from graph_surgery.samples import proof_images
from tests.support import calibrated, nms_oracle
from tests.support.exporters import CLASSES, LEVELS, write
from tests.support.graphs import IMAGE, Variant, detector, nms_node, run
from tests.support.habits import Habits

IMAGES = np.random.default_rng(5).normal(size=(2, 3, IMAGE, IMAGE)).astype(np.float32)
BY_ANCHOR = Habits(opset=18, channels="anchor first", priors="by cell")


def made_by(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("weights", ["stored", "shared"])
def test_channels_follow_one_another_coordinate_by_coordinate(weights):
    """Written out: channel r * A + a of the operator is channel a * R + r of the graph."""
    model = write(replace(BY_ANCHOR, weights=weights))
    result = insert_nms(model)
    assert any("filters of the head convolutions and priors" in line for line in result.changes)
    assert any("equal scores" in line for line in result.changes)
    heads = list(nms_node(result.model).input[:-1])
    before = calibrated.run(model, IMAGES[:1], heads, optimise=False)
    after = calibrated.run(result.model, IMAGES[:1], heads, optimise=False)
    anchors = [LEVELS[0][0]] * 2 if weights == "shared" else [a for a, _ in LEVELS]
    rows_of = [4, 4, CLASSES, CLASSES]
    for one, other, count, rows in zip(before, after, anchors * 2, rows_of, strict=True):
        for anchor in range(count):
            for row in range(rows):
                old, new = one[:, anchor * rows + row], other[:, row * count + anchor]
                np.testing.assert_allclose(new, old, atol=1e-6)
    filters = {made_by(result.model, name).input[1] for name in heads}
    assert len(filters) == (2 if weights == "shared" else 4)


def test_a_graph_in_the_operators_order_keeps_its_filters():
    result = insert_nms(write(Habits(opset=18)))
    assert not any("order" in line for line in result.changes)
    assert not any(t.name.endswith("_ordered") for t in result.model.graph.initializer)


def test_the_proof_notices_channels_that_stayed(monkeypatch):
    monkeypatch.setattr(graph_surgery.replace, "order_channels", lambda *_: None)
    with pytest.raises(SurgeryError, match="network's outputs change by"):
        insert_nms(write(BY_ANCHOR))


def spoil(model: onnx.ModelProto, how: str) -> None:
    """Make the first head of a detector one whose channels cannot be put in order."""
    heads = set(nms_node(insert_nms(model).model).input)
    head = next(node for node in model.graph.node if heads.intersection(node.output))
    weight = next(t for t in model.graph.initializer if t.name == head.input[1])
    if how == "an output":
        model.graph.output.add(name=head.output[0])
    elif how == "read":
        model.graph.node.add(op_type="Abs", input=head.output, output=["size"])
        model.graph.output.add(name="size")
    elif how == "grouped":
        half = numpy_helper.to_array(weight)[:, :6].copy()
        weight.CopyFrom(numpy_helper.from_array(half, weight.name))
        next(a for a in head.attribute if a.name == "group").i = 2
    else:
        node = helper.make_node("Mul", [weight.name, "gain"], ["gained"])
        model.graph.node.insert(0, node)
        model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, []))
        head.input[1] = "gained"


@pytest.mark.parametrize(
    ("how", "lacks"),
    {
        "an output": "others than the postprocessing read it",
        "read": "others than the postprocessing read it",
        "grouped": "the convolution is in groups",
        "computed weights": "its weights are no constants",
    }.items(),
)
def test_channels_that_cannot_be_put_in_order_are_refused(how, lacks):
    levels = 1 if how == "read" else 2  # of more, each leads to a Concat alone
    model = write(replace(BY_ANCHOR, levels=levels))
    spoil(model, how)
    with pytest.raises(SurgeryError, match=rf"head 't.* {lacks} \(Conv .*export with coordinate"):
        insert_nms(model)
    plain = write(Habits(opset=18, levels=levels))
    spoil(plain, how)
    assert insert_nms(plain).modified


def test_images_with_their_channels_last_become_those_of_every_engine(tmp_path):
    model = write(Habits(opset=18, image="NHWC"))
    assert operators(model).count("Transpose") > 0
    result = insert_nms(model)
    assert any("images [N, H, W, C] became [N, C, H, W]" in line for line in result.changes)
    assert any("proved in ONNX Runtime on random images" in line for line in result.changes)
    assert "Transpose" not in operators(result.model)
    onnx.save(result.model, tmp_path / "model.onnx")
    detector = load_detector(tmp_path / "model.onnx")
    assert detector.input.shape == (3, IMAGE, IMAGE)
    images = calibrated.write_images(tmp_path, IMAGES)
    quantized = quantize(result.model, calibrate(detector, images, method="minmax"))
    assert quantized.graph.input[0].type.tensor_type.elem_type == TensorProto.INT8


def test_whoever_reads_images_with_their_channels_last_still_does():
    """An image that is an output, one that is turned twice, and a Transpose that is an output."""
    model = write(Habits(opset=18, image="NHWC"))
    turn = next(node for node in model.graph.node if node.op_type == "Transpose")
    model.graph.node.add(op_type="Relu", input=["image"], output=["bright"])
    for name in ("bright", turn.output[0]):
        model.graph.output.add(name=name)
    new = insert_nms(onnx.shape_inference.infer_shapes(model)).model
    image = IMAGES[:1]
    before = run(model, {"image": image.transpose(0, 2, 3, 1)})[3:]
    after = run(new, {"image": image})[2:]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [output.name for output in new.graph.output][2:] == ["bright", turn.output[0]]


def test_the_proof_notices_images_that_are_turned_wrongly(monkeypatch):
    """Height for width: the sizes are the same."""

    def wrongly(graph, images):
        right(graph, images)
        first = next(node for node in graph.nodes if node.op == "Conv")
        turned = gs.Variable("turned", np.float32, first.inputs[0].shape)
        graph.nodes.insert(
            0, gs.Node("Transpose", "wrong", {"perm": [0, 1, 3, 2]}, [first.inputs[0]], [turned])
        )
        first.inputs[0] = turned

    right = graph_surgery.replace.channels_first
    monkeypatch.setattr(graph_surgery.replace, "channels_first", wrongly)
    with pytest.raises(SurgeryError, match="network's outputs change by"):
        insert_nms(write(Habits(opset=18, image="NHWC")))


def test_a_box_is_compared_before_it_is_clipped(monkeypatch):
    """A shifted prior without a candidate in any of the proof's images: no row shows it."""

    def find_wrongly(graph, model):
        tail = find_tail(graph, model)
        found = np.zeros(tail.heads.num_priors, bool)
        for _, conf in proof_images(tail):
            scores = nms_oracle.softmax(conf[None])[0, 1:]
            found |= (scores > tail.attributes.confidenceThreshold).any(axis=0)
        priors = tail.priors.copy()
        priors.reshape(2, -1, 4)[0, np.flatnonzero(~found)[0]] += np.float32(0.3)
        return replace(tail, priors=priors)

    find_tail = graph_surgery.replace.find_tail
    monkeypatch.setattr(graph_surgery.replace, "find_tail", find_wrongly)
    model = detector(Variant(opset=18))
    with pytest.raises(SurgeryError, match="disagree on boxes before they are clipped: of prior"):
        insert_nms(model)
    monkeypatch.setattr(graph_surgery.verify, "_same_boxes", lambda *_: None)
    assert insert_nms(model).modified

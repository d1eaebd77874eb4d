"""Graphs that normalise their images: taken out where it is ImageNet's, else refused."""

from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graph_surgery.normalisation
import graph_surgery.replace
from engine.data.preprocessed import MEAN, STD
from engine.protocol import InputSpec
from graph_surgery.errors import SurgeryError
from graph_surgery.replace import insert_nms
from harness.data.transform import transform
from tests.support.graphs import (
    IMAGE,
    UNCAPPED,
    assert_same_detections,
    detector,
    rows_of_three,
    run,
)

PLAIN = replace(UNCAPPED, opset=18)
MEANS, DEVIATIONS = (np.float32(one).reshape(3, 1, 1) for one in (MEAN, STD))
FIRST = np.array([0])
PAD = "Pad", np.array([0, 0, 0, 0, 0, 0, 32, 32])
CROP = "Slice", np.array([0, 0]), np.array([IMAGE] * 2), np.array([2, 3])
F = np.float32
SAID = "the graph normalised its images itself"


def before(*steps: tuple, constant_nodes: bool = False) -> onnx.ModelProto:
    """A detector behind steps (operator, constants, attributes), each on what the last made.

    A constant None in front of another says that the constant is the first operand.
    """
    model = detector(PLAIN)
    graph, nodes, made = model.graph, [], "image"
    for number, (operator, *constants) in enumerate(steps):
        attributes = constants.pop() if constants and isinstance(constants[-1], dict) else {}
        first = bool(constants) and constants[0] is None
        names = []
        for one in constants[first:]:
            names.append(f"s{number}_{len(names)}")
            tensor = numpy_helper.from_array(np.asarray(one), names[-1])
            if constant_nodes:
                nodes.append(helper.make_node("Constant", [], names[-1:], value=tensor))
            else:
                graph.initializer.append(tensor)
        operands = [*names, made] if first else [made, *names]
        made = f"made{number}"
        nodes.append(helper.make_node(operator, operands, [made], **attributes))
    for node in graph.node:
        node.input[:] = [made if name == "image" else name for name in node.input]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    onnx.checker.check_model(model, full_check=True)
    return model


def in_one(mean=MEANS, deviation=DEVIATIONS) -> list[tuple]:
    return [("Sub", mean), ("Div", deviation)]


IMAGENET = {
    "0..1": (1, in_one()),
    "0..1, 4-D": (1, in_one(MEANS[None], DEVIATIONS[None])),
    "0..1, as a x + b": (1, [("Mul", 1 / DEVIATIONS), ("Add", -MEANS / DEVIATIONS)]),
    "0..1, turned": (1, [("Sub", None, MEANS), ("Div", -DEVIATIONS)]),
    "0..1, from the left": (1, [("Add", None, -MEANS), ("Mul", None, 1 / DEVIATIONS)]),
    "0..255": (255, in_one(MEANS * F(255), DEVIATIONS * F(255))),
    "0..255, in three": (255, [("Div", F(255)), *in_one()]),
    "of a batch of one": (
        1,
        [("Gather", np.array(0)), *in_one(), ("Unsqueeze", FIRST)],
    ),
    "of a batch that stays": (
        1,
        [
            ("Reshape", np.array([1, 3, IMAGE, IMAGE])),
            ("Slice", FIRST, FIRST + 1, FIRST),
            ("Squeeze", FIRST),
            ("Cast", {"to": TensorProto.FLOAT}),
            *in_one(),
            ("Unsqueeze", FIRST),
        ],
    ),
    "channels last": (
        1,
        [
            ("Transpose", {"perm": [0, 2, 3, 1]}),
            *in_one(MEANS.reshape(3), DEVIATIONS.reshape(3)),
            ("Transpose", {"perm": [0, 3, 1, 2]}),
        ],
    ),
    "padded behind": (1, [*in_one(), PAD, CROP]),
}


def rows_before(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    return rows_of_three(*run(model, {"image": image[None]}))


def assert_rows(new: onnx.ModelProto, image: np.ndarray, expected: np.ndarray) -> None:
    detections, count = run(new, {"image": image[None]})[:2]
    assert count[0] > 3
    assert_same_detections(detections[0, : count[0], 1:], expected)


@pytest.mark.parametrize("constant_nodes", [False, True])
@pytest.mark.parametrize("name", IMAGENET)
def test_a_graph_takes_normalised_images_afterwards(name, constant_nodes):
    """What `harness preprocess` makes of a picture, for what its pixels gave before."""
    top, steps = IMAGENET[name]
    model = before(*steps, constant_nodes=constant_nodes)
    result = insert_nms(model)
    onnx.checker.check_model(result.model, full_check=True)
    (said,) = (line for line in result.changes if SAID in line)
    assert f"pixels in 0..{top}: taken out, images are normalised before" in said
    assert any("proved in ONNX Runtime on random images" in line for line in result.changes)
    stays = any("stays fixed" in line for line in result.changes)
    assert stays == (name == "of a batch that stays")
    picture = np.random.default_rng(6).integers(0, 256, (50, 41, 3)).astype(np.uint8)  # BGR
    pixels = cv2.resize(picture[..., ::-1].astype(np.float32), (IMAGE, IMAGE)).transpose(2, 0, 1)
    images = np.empty((3, IMAGE, IMAGE), np.float32)
    transform(picture, InputSpec("image", images.shape, "float32"), images)
    assert_rows(result.model, images, rows_before(model, pixels * F(top / 255)))
    assert not insert_nms(result.model).modified


def test_the_constants_are_those_of_the_preprocessing():
    assert (graph_surgery.normalisation.MEAN, graph_surgery.normalisation.STD) == (MEAN, STD)


def test_every_image_of_a_batch_taken_apart_counts():
    """Two images, each normalised by nodes of its own, put together again."""
    model = before(*in_one())
    nodes = model.graph.node
    del nodes[:2]
    made = [helper.make_node("Split", ["image"], ["one", "two"], axis=0, num_outputs=2)]
    for part in ("one", "two"):
        made.append(helper.make_node("Sub", [part, "s0_0"], [f"{part}_sub"]))
        made.append(helper.make_node("Div", [f"{part}_sub", "s1_0"], [f"{part}_div"]))
    made.append(helper.make_node("Concat", ["one_div", "two_div"], ["made1"], axis=0))
    for node in reversed(made):
        nodes.insert(0, node)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    new, found = graph_surgery.normalisation.take_out_normalisation(model)
    assert found.top == 1
    assert not {"Sub", "Div"} & {node.op_type for node in new.graph.node[:4]}
    nodes[2].input[1] = "s0_0"  # the first is divided by the mean
    with pytest.raises(SurgeryError, match="not for all that read them"):
        graph_surgery.normalisation.take_out_normalisation(model)


@pytest.mark.parametrize(
    ("steps", "said"),
    {
        "another mean": (in_one(MEANS + F(0.01)), r"by mean \(0.495, 0.466, 0.416\) and"),
        "another deviation": (in_one(deviation=F(0.5)), r"deviation \(0.5, 0.5, 0.5\), and this"),
        "BGR": (in_one(MEANS[::-1], DEVIATIONS[::-1]), r"by mean \(0.406, 0.456, 0.485\) and"),
        "a range": ([("Div", F(255))], r"by mean \(0, 0, 0\) and deviation \(255, 255, 255\)"),
        "-1..1": ([("Mul", F(2)), ("Sub", F(1))], r"by mean \(0.5, 0.5, 0.5\) and deviation"),
        "padded before": (
            [PAD, *in_one(), CROP],
            "computes with its images 'image' .Sub",
        ),
        "clipped before": ([("Clip", F(0), F(1)), *in_one()], "computes with its images"),
        "by pixel": ([("Sub", np.ones((3, IMAGE, IMAGE), F))], "computes with its images"),
        "no multiple": ([("Div", None, F(1))], "computes with its images 'image' .Div"),
    }.values(),
)
def test_another_map_is_refused(steps, said):
    with pytest.raises(SurgeryError, match=said) as error:
        insert_nms(before(*steps))
    assert "this project's preprocessing normalises by ImageNet's mean (0.485" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_changes_nothing_is_left():
    model = before(("Mul", F(1)), ("Add", F(0)))
    result = insert_nms(model)
    assert not any(SAID in line for line in result.changes)
    image = np.random.default_rng(4).normal(size=(3, IMAGE, IMAGE)).astype(F)
    assert_rows(result.model, image, rows_before(model, image))


def test_the_proof_notices_a_map_read_wrongly(monkeypatch):
    def wrongly(model):
        new, found = right(model)
        return new, replace(found, shift=found.shift + 0.01)

    right = graph_surgery.replace.take_out_normalisation
    monkeypatch.setattr(graph_surgery.replace, "take_out_normalisation", wrongly)
    with pytest.raises(SurgeryError, match="network's outputs change by"):
        insert_nms(before(*in_one()))


def test_a_surgery_that_left_it_is_not_taken(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(graph_surgery.replace, "take_out_normalisation", lambda model: (model, None))
        model = insert_nms(before(*in_one())).model
    with pytest.raises(SurgeryError, match=r"operated on before, but .* itself.*; start again"):
        insert_nms(model)

"""Bias correction: against PyTorch's convolutions, and by what it is for, a mean without error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.bias import correct_biases
from engine.quantization.calibration import calibrate
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from graph_surgery.replace import insert_nms
from tests.support.calibrated import (
    activations,
    constants,
    heads,
    run,
    snr_db,
    to_int8,
    write_images,
)
from tests.support.graphs import IMAGE, UNCAPPED, detector
from tests.support.int8_simulation import rounded, step

PIXELS = np.random.default_rng(3).uniform(-1.8, 2.2, (5, 3, IMAGE, IMAGE)).astype(np.float32)
PIXELS[1] = PIXELS[1, :, :1, :1]  # one colour
FORMS = [("fp32", "gpu"), ("fp16", "gpu"), ("fp32", "cpu")]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """A detector whose second filter of every convolution has weights that all round to 0 but one.

    What its others give to the sum is lost: an error whose mean is far from 0.
    """
    new = insert_nms(detector(replace(UNCAPPED, norms=True, opset=18))).model
    values = {tensor.name: tensor for tensor in new.graph.initializer}
    for node in new.graph.node:
        if node.op_type == "Conv":
            weight = numpy_helper.to_array(values[node.input[1]]).copy()
            weight[1] = np.abs(weight).max() * 0.45 / 127
            weight[1, 0, 1, 1] = np.abs(weight).max()
            values[node.input[1]].CopyFrom(numpy_helper.from_array(weight, node.input[1]))
    return new


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bias")
    onnx.save(model, folder / "model.onnx")
    images = write_images(folder, PIXELS)
    known = load_detector(folder / "model.onnx")
    return known, calibrate(known, images), images


def convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    nodes = {node.output[0]: node for node in model.graph.node}
    return [nodes[layer.node] for layer in find_placement(model).layers]


def geometry(node: onnx.NodeProto) -> dict:
    known = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {"stride": known["strides"], "padding": known["pads"][:2]}


@pytest.mark.parametrize(("float_type", "target"), FORMS)
def test_against_pytorch(place, float_type, target) -> None:
    known, calibration, images = place
    found = correct_biases(known, calibration, images, float_type=float_type, target=target)
    values, stored = activations(known.model, PIXELS), constants(known.model)
    points = {point.node: point.source for point in find_placement(known.model).points}
    nodes = convolutions(known.model)
    assert found.keys() == {node.output[0] for node in nodes}
    for node in nodes:
        x, weight = values[node.input[0]], stored[node.input[1]]
        given = torch.tensor(weight)
        scale = step(calibration.scales[points[node.output[0]]])
        if target == "cpu" and node.input[0] != "image":  # every other tensor is a ReLU's
            fine = np.float32(scale * 127 / 255)
            q = np.float32(np.rint(x / fine).clip(0, 255) * fine)
        else:
            q = rounded(x, scale)
        largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
        if float_type == "fp16":
            largest, weight = np.vectorize(step)(largest), np.float32(np.float16(weight))
        both = [
            torch.conv2d(torch.tensor(a), w, **geometry(node)).double()
            for a, w in ((x, given), (q, torch.tensor(rounded(weight, largest))))
        ]
        lost = (both[0] - both[1]).mean(dim=(0, 2, 3)).numpy()
        change = found[node.output[0]] - stored[node.input[2]]
        np.testing.assert_allclose(change, lost, atol=2e-3 * np.abs(lost).max())
        assert np.abs(lost).argmax() == 1  # the filter that was made bad


@pytest.mark.parametrize(("float_type", "target"), FORMS)
def test_a_layer_in_int8_has_the_mean_of_the_float_one(place, float_type, target) -> None:
    """In the files themselves, each with one layer in INT8, behind which all else stays float."""
    known, calibration, images = place
    options = {"float_type": float_type, "target": target}
    biases = correct_biases(known, calibration, images, **options)
    layers = find_placement(known.model).layers
    for layer in layers[1:]:  # what the image is before the first is float here
        others = [other.name for other in layers if other.name != layer.name]
        expected = run(known.model, PIXELS, [layer.node])[0].mean(axis=(0, 2, 3), dtype=float)
        off = []
        for given in (None, biases):
            int8 = quantize(known.model, calibration, keep_float=others, biases=given, **options)
            made = run(int8, PIXELS, [layer.node], optimise=False)[0].mean(
                axis=(0, 2, 3), dtype=float
            )
            off.append(np.abs(made - expected).max())
        rounding = 2**-10 * np.abs(expected).max() if float_type == "fp16" else 0
        assert off[1] < 0.01 * off[0] + rounding < 0.5 * off[0]


@pytest.mark.parametrize(("float_type", "target"), FORMS)
def test_the_planted_error_goes(place, float_type, target) -> None:
    known, calibration, images = place
    options = {"float_type": float_type, "target": target}
    biases = correct_biases(known, calibration, images, **options)
    reference = run(known.model, PIXELS, heads(known.model))
    found = []
    for given in (None, biases):
        int8 = quantize(known.model, calibration, biases=given, **options)
        found.append(snr_db(reference, run(int8, to_int8(int8, PIXELS), heads(int8))))
    assert found[1] > found[0] + 3


def test_the_same_bits_again(place) -> None:
    known, calibration, images = place
    first, second = (
        quantize(known.model, calibration, biases=correct_biases(known, calibration, images))
        for _ in range(2)
    )
    assert first.SerializeToString() == second.SerializeToString()


def test_what_stays_float_keeps_its_bias_and_the_file_says_what_was_done(place) -> None:
    known, calibration, images = place
    (first, *_, last) = find_placement(known.model).layers
    biases = correct_biases(known, calibration, images)
    int8 = quantize(known.model, calibration, keep_float=[last.name], biases=biases)
    nodes = {node.output[0]: node for node in int8.graph.node}
    stored = constants(int8)
    np.testing.assert_array_equal(stored[nodes[last.node].input[2]], last.bias)
    np.testing.assert_array_equal(stored[nodes[first.node].input[2]], biases[first.node])
    for given, said in ((biases, "bias"), (None, None)):
        new = quantize(known.model, calibration, biases=given)
        assert {e.key: e.value for e in new.metadata_props}.get("correction") == said


def test_a_convolution_without_a_bias_gets_one(model, tmp_path) -> None:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    plain, computed, *_ = convolutions(bare)
    del plain.input[2]
    given = computed.input[2]
    computed.input[2] = f"{given}_made"
    copy = onnx.helper.make_node("ReduceMax", [plain.output[0]], [f"{given}_one"], keepdims=0)
    add = onnx.helper.make_node("Add", [given, f"{given}_one"], [f"{given}_made"])
    place = list(bare.graph.node).index(plain) + 1
    for node in (add, copy):
        bare.graph.node.insert(place, node)
    onnx.save(bare, tmp_path / "model.onnx")
    images, known = write_images(tmp_path, PIXELS), load_detector(tmp_path / "model.onnx")
    calibration = calibrate(known, images)
    biases = correct_biases(known, calibration, images)
    assert plain.output[0] in biases and computed.output[0] not in biases
    int8 = quantize(known.model, calibration, biases=biases)
    nodes = {node.output[0]: node for node in int8.graph.node}
    made = constants(int8)[nodes[plain.output[0]].input[2]]
    np.testing.assert_array_equal(made, biases[plain.output[0]])
    assert nodes[computed.output[0]].input[2] == f"{given}_made"


def test_other_images_are_refused(place, tmp_path) -> None:
    known, calibration, _ = place
    with pytest.raises(EngineError, match="not the images of the calibration"):
        correct_biases(known, calibration, write_images(tmp_path, PIXELS[::-1]))
    with pytest.raises(EngineError, match="5 images wanted"):
        correct_biases(known, calibration, write_images(tmp_path, PIXELS[:2]))

"""INT8 of graphs with other exporters' habits, against the same network written plainly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from graph_surgery.replace import insert_nms
from tests.support.calibrated import constants, run, write_images
from tests.support.graphs import IMAGE, UNCAPPED, detector

pytestmark = pytest.mark.slow  # some forty detectors are quantised

IMAGES = np.random.default_rng(3).normal(size=(2, 3, IMAGE, IMAGE)).astype(np.float32)
PIXELS = np.random.default_rng(4).integers(-127, 128, (2, 3, IMAGE, IMAGE)).astype(np.int8)


@pytest.fixture
def plain() -> onnx.ModelProto:
    return insert_nms(detector(replace(UNCAPPED, norms=True, opset=18))).model


def int8(model: onnx.ModelProto, folder, float_type="fp32") -> onnx.ModelProto:
    onnx.save(model, folder / "model.onnx")
    images = write_images(folder, IMAGES)
    calibration = calibrate(load_detector(folder / "model.onnx"), images, method="minmax")
    return quantize(model, calibration, float_type=float_type)


def assert_same_heads(a: onnx.ModelProto, b: onnx.ModelProto) -> None:
    """Bit for bit, node by node as the files say."""
    heads = list(a.graph.node[-1].input[:-1])
    for one, other in zip(*(run(m, PIXELS, heads, optimise=False) for m in (a, b)), strict=True):
        assert np.ptp(one) > 0
        np.testing.assert_array_equal(one, other)


def weights(model: onnx.ModelProto) -> list[str]:
    return [node.input[1] for node in model.graph.node if node.op_type == "Conv"]


def behind(model: onnx.ModelProto, op: str, name: str) -> np.ndarray:
    """Let a node make a weight or bias of the float network; what it makes."""
    graph = model.graph
    stored = next(tensor for tensor in graph.initializer if tensor.name == name)
    value, made, attributes = numpy_helper.to_array(stored), name, {}
    inputs = {f"{name}_stored": value}
    if op == "Constant":
        inputs, attributes = {}, {"value": onnx.TensorProto()}
        attributes["value"].CopyFrom(stored)
    elif op == "Cast":
        inputs, attributes = {f"{name}_stored": value.astype(np.float16)}, {"to": 1}
        value = value.astype(np.float16).astype(np.float32)
    elif op == "DequantizeLinear":
        step = np.float32(np.abs(value).max() / 100 or 1)
        steps = np.rint(value / step).astype(np.int8)
        inputs, value = {f"{name}_stored": steps, f"{name}_step": step}, steps * step
    graph.initializer.remove(stored)
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in inputs.items())
    graph.node.insert(0, helper.make_node(op, list(inputs), [made], **attributes))
    return value


@pytest.mark.parametrize("float_type", ["fp32", "fp16"])
@pytest.mark.parametrize("op", ["Identity", "Cast", "Constant", "DequantizeLinear"])
def test_weights_and_biases_behind_a_node(plain, op, float_type, tmp_path) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(plain)
    biases = [node.input[2] for node in plain.graph.node if node.op_type == "Conv"]
    values = {name: behind(other, op, name) for name in [*weights(plain), *biases]}
    for tensor in plain.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    expected, made = int8(plain, tmp_path, float_type), int8(other, tmp_path, float_type)
    assert_same_heads(made, expected)
    assert set(weights(plain)) <= constants(made).keys()


@pytest.mark.parametrize("float_type", ["fp32", "fp16"])
def test_convolutions_that_share_their_weights(plain, float_type, tmp_path) -> None:
    """Each has scales of its own, for its bias and its input have a say in them."""
    convs = [node for node in plain.graph.node if node.op_type == "Conv"]
    name, spare = convs[1].input[1], convs[2].input[1]
    for tensor in plain.graph.initializer:
        if tensor.name == spare:
            tensor.CopyFrom(numpy_helper.from_array(constants(plain)[name], spare))
    shared = onnx.ModelProto()
    shared.CopyFrom(plain)
    for node in shared.graph.node:
        node.input[:] = [name if read == spare else read for read in node.input]
    assert_same_heads(int8(shared, tmp_path, float_type), int8(plain, tmp_path, float_type))
    names = [layer.name for layer in find_placement(shared).layers]
    assert len(set(names)) == len(names)
    assert {name, f"{name}#2"} <= set(names)


def test_names_that_quantisation_wants_may_exist(plain, tmp_path) -> None:
    """Of a tensor of the network, of one within a subgraph, of one behind the heads."""
    expected = int8(plain, tmp_path)
    taken = onnx.ModelProto()
    taken.CopyFrom(plain)
    relu = next(node for node in taken.graph.node if node.op_type == "Relu")
    weight = weights(plain)[0]
    names = {f"{relu.output[0]}_scale": 2.0, f"{weight}_zero_point": 3.0}
    taken.graph.initializer.extend(
        numpy_helper.from_array(np.float32(value), name) for name, value in names.items()
    )
    taken.graph.node.add(op_type="Mul", input=list(names), output=[f"{weight}_quantized"])
    taken.graph.output.append(helper.make_tensor_value_info(f"{weight}_quantized", 1, []))
    made = int8(taken, tmp_path)
    assert run(made, PIXELS, [f"{weight}_quantized"])[0] == 6
    made.graph.output.pop()
    place = next(i for i, n in enumerate(made.graph.node) if n.op_type == "NMS_OPT_TRT")
    made.graph.node.append(made.graph.node.pop(place))
    assert_same_heads(made, expected)


def test_a_float16_weight_behind_a_node_is_refused_before_calibration(tmp_path) -> None:
    model = insert_nms(detector(replace(UNCAPPED, half=True, opset=18))).model
    for name in weights(model):
        behind(model, "Identity", name)
    with pytest.raises(EngineError, match="are FLOAT16; quantisation starts from the float32"):
        int8(model, tmp_path)


@pytest.mark.parametrize("target", ["gpu", "cpu"])
@pytest.mark.parametrize("looks", [True, False], ids=["at pixels", "at the shape"])
def test_an_image_that_is_also_read_in_float(plain, target, looks, tmp_path) -> None:
    """Scaled by its own mean, or by its number of pixels, both beside the first convolution."""
    graph = plain.graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    filters = constants(plain)[first.input[1]].shape[0]
    if looks:
        extra = [helper.make_node("GlobalAveragePool", ["image"], ["three"], "mean")]
    else:
        extra = [
            helper.make_node("Size", ["image"], ["pixels"]),
            helper.make_node("Cast", ["pixels"], ["many"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Expand", ["many", "three_shape"], ["three"]),
        ]
    extra.append(helper.make_node("Conv", ["three", "own_weight"], ["more"], "own"))
    extra.append(helper.make_node("Add", [first.output[0], "more"], ["with_more"]))
    rng = np.random.default_rng(5)
    own = rng.normal(size=(filters, 3, 1, 1)).astype(np.float32) / 1e6
    graph.initializer.append(numpy_helper.from_array(own, "own_weight"))
    graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 1, 1]), "three_shape"))
    for node in graph.node:
        node.input[:] = ["with_more" if name == first.output[0] else name for name in node.input]
    position = list(graph.node).index(first) + 1
    for node in reversed(extra):
        graph.node.insert(position, node)
    onnx.save(plain, tmp_path / "model.onnx")
    detector = load_detector(tmp_path / "model.onnx")
    calibration = calibrate(detector, write_images(tmp_path, IMAGES), method="minmax")
    if not looks:
        quantized = quantize(plain, calibration, target=target)
        assert quantized.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT8
        return
    name = find_placement(plain).layers[0].name
    complaint = f"'image' is read in INT8 by {name} and in float by GlobalAveragePool 'mean', "
    with pytest.raises(EngineError, match=complaint) as caught:
        quantize(plain, calibration, target=target)
    assert f"--keep-float '{name}'" in str(caught.value)
    kept = quantize(plain, calibration, target=target, keep_float=[name])
    assert kept.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_function_in_front_of_the_heads_is_refused(plain) -> None:
    conv, relu = plain.graph.node[:2]
    names = list(conv.input)
    imports = [helper.make_opsetid("", 18)]
    plain.functions.append(
        helper.make_function("mine", "Stem", names, relu.output, [conv, relu], imports)
    )
    call = helper.make_node("Stem", names, relu.output, domain="mine")
    del plain.graph.node[:2]
    plain.graph.node.insert(0, call)
    plain.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(EngineError, match=r"Stem is a function of the model.*inline it"):
        find_placement(plain)

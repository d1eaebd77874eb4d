"""The INT8 graph: what is quantised where, and that it computes what it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from engine.errors import EngineError
from engine.load import load_engine
from engine.quantization.network import network_sha256
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from engine.quantization.scales import activation_scale, weight_scales
from tests.support.calibrated import (
    activations,
    constants,
    heads,
    run,
    snr_db,
    to_int8,
)


def producers(model):
    return {name: node for node in model.graph.node for name in node.output}


def readers(model, name):
    return [node for node in model.graph.node if name in node.input]


# Placement


@pytest.mark.parametrize("which", ["int8", "half"])
def test_what_is_quantised(which, request, model) -> None:
    """For every Conv, Add, MaxPool, Relu and head of the detector: which inputs are quantised."""
    quantized = request.getfixturevalue(which)
    made, values = producers(quantized), constants(quantized)
    count = Counter(node.op_type for node in quantized.graph.node)
    assert (count["Conv"], count["Relu"], count["Add"], count["MaxPool"]) == (51, 37, 13, 1)
    # 51 weights and 41 activations, one of which comes in quantised
    assert (count["QuantizeLinear"], count["DequantizeLinear"]) == (91, 92)

    def source(name):
        """What a quantised input is before its Q/DQ; None for one that is not quantised."""
        node = made.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        quantise = made.get(node.input[0])
        if quantise is None:
            assert node.input[0] == "image"
            return "image"
        assert quantise.op_type == "QuantizeLinear"
        assert quantise.input[1:] == node.input[1:]
        return quantise.input[0]

    float_made = producers(model)
    by_weight = {node.input[1]: node for node in model.graph.node if node.op_type == "Conv"}
    for node in quantized.graph.node:
        if node.op_type == "Conv":
            weight = source(node.input[1])
            assert weight in values  # weights: float, then Q/DQ
            assert source(node.input[0]) == by_weight[weight].input[0]  # data: the same tensor
            for bias in node.input[2:]:  # float, no Q/DQ
                assert values[bias].dtype.kind == "f"
        elif node.op_type == "Add":
            quantised = [i for i in (0, 1) if source(node.input[i]) is not None]
            assert len(quantised) == 1
            main = made[node.input[1 - quantised[0]]]
            assert main.op_type == "Conv"  # the main branch comes straight from its convolution
            block = source(main.input[1]).removesuffix("conv2.weight")
            assert block != source(main.input[1])
            skip = float_made[source(node.input[quantised[0]])]
            first = by_weight[f"{block}conv1.weight"]
            if f"{block}downsample.0.weight" in by_weight:
                assert skip.input[1] == f"{block}downsample.0.weight"
            else:  # the skip is what the block begins with
                assert skip.output[0] == first.input[0]
        elif node.op_type == "MaxPool":
            assert source(node.input[0]) == "relu"
        elif node.op_type == "Relu":
            assert made[node.input[0]].op_type in ("Conv", "Add")  # nothing in between
        elif node.op_type == "NMS_OPT_TRT":
            assert [made[name].op_type for name in node.input[:-1]] == ["Conv"] * 12
            assert node.input[-1] in values
        else:
            assert node.op_type in ("QuantizeLinear", "DequantizeLinear")


@pytest.mark.parametrize("which", ["int8", "half"])
def test_scales_and_zero_points(which, request, calibration) -> None:
    quantized = request.getfixturevalue(which)
    values = constants(quantized)
    sources = []
    for node in quantized.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = values[node.input[1]], values[node.input[2]]
            assert zero.dtype == np.int8
            assert zero.shape == scale.shape
            assert not zero.any()
            assert (scale > 0).all()
        if node.op_type == "QuantizeLinear":
            sources.append(node.input[0])
            axes = [a.i for a in node.attribute if a.name == "axis"]
            if node.input[0] in values:
                weight = values[node.input[0]].astype(np.float64)
                assert axes == [0]
                assert scale.shape == (len(weight),)
                largest = np.abs(weight).max(axis=(1, 2, 3))
                np.testing.assert_allclose(scale * 127.0, largest, rtol=2e-3)
            else:
                assert axes == []
                assert scale.shape == ()
                wanted = calibration.scales[node.input[0]]
                assert wanted <= float(scale) <= wanted * 1.001
    assert max(Counter(sources).values()) == 1  # readers of one tensor share its Q/DQ
    assert set(sources) - values.keys() == calibration.scales.keys() - {"image"}


def test_the_image_comes_in_as_int8(int8, half, calibration, tmp_path) -> None:
    scales = set()
    for index, quantized in enumerate((int8, half)):
        (image,) = quantized.graph.input
        assert (image.name, image.type.tensor_type.elem_type) == ("image", TensorProto.INT8)
        (first,) = readers(quantized, "image")
        assert first.op_type == "DequantizeLinear"
        path = tmp_path / f"{index}.onnx"
        onnx.save(quantized, path)
        spec = load_engine("onnxruntime", path).input_spec
        assert (spec.name, spec.dtype, spec.shape) == ("image", "int8", (3, 400, 400))
        assert spec.scale == float(constants(quantized)[first.input[1]])
        scales.add(spec.scale)
    assert len(scales) == 1  # so that one preprocessed set serves both
    assert scales.pop() == pytest.approx(calibration.scales["image"], rel=1e-3)


def test_what_calibration_did_not_see_goes_along(model, calibration) -> None:
    told = replace(calibration, empty_images=2)
    found = {entry.key: entry.value for entry in quantize(model, told).metadata_props}
    assert (found["calibration_images"], found["calibration_empty_images"]) == ("3", "2")


def test_everything_else_stays_as_it_was(model, int8) -> None:
    (before,) = (n for n in model.graph.node if n.op_type == "NMS_OPT_TRT")
    (after,) = (n for n in int8.graph.node if n.op_type == "NMS_OPT_TRT")
    assert before == after
    assert list(model.functions) == list(int8.functions)
    assert list(model.graph.output) == list(int8.graph.output)
    assert model.opset_import == int8.opset_import
    new = constants(int8)
    for name, value in constants(model).items():
        np.testing.assert_array_equal(new[name], value)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    found = {entry.key: entry.value for entry in int8.metadata_props}
    assert kept.items() <= found.items()
    assert found["calibration_method"] == "minmax"
    assert (found["float_type"], found["float_layers"]) == ("fp32", "")


# What it computes


def fake_quantize(x, scale, axis=None):
    shape = [-1 if i == axis else 1 for i in range(x.ndim)] if axis is not None else []
    scale = torch.as_tensor(scale).reshape(shape)
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


def simulate(model, calibration, values):
    """Every node of the float graph, each from the given values of its inputs, in PyTorch.

    Fake quantisation goes where the rules say, told by the names of the weights.
    """
    weights = {name: torch.from_numpy(v.copy()) for name, v in constants(model).items()}
    made = producers(model)
    results = {}

    def q(name):
        return fake_quantize(values[name], activation_scale(calibration.scales[name]))

    def is_main(name):
        return made[name].op_type == "Conv" and made[name].input[1].endswith("conv2.weight")

    for node in model.graph.node:
        attribute = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            weight = weights[node.input[1]]
            out = torch.conv2d(
                q(node.input[0]),
                fake_quantize(weight, weight_scales(weight.numpy()), axis=0),
                weights[node.input[2]] if len(node.input) > 2 else None,
                attribute["strides"],
                attribute["pads"][0],
                attribute["dilations"],
            )
        elif node.op_type == "Add":
            out = sum(values[name] if is_main(name) else q(name) for name in node.input)
        elif node.op_type == "MaxPool":
            kernel, strides = attribute["kernel_shape"], attribute["strides"]
            out = torch.max_pool2d(q(node.input[0]), kernel, strides, attribute["pads"][0])
        elif node.op_type == "Relu":
            out = torch.relu(values[node.input[0]])
        else:
            assert node.op_type == "NMS_OPT_TRT"
            continue
        results[node.output[0]] = out
    assert len(results) == 102
    return results


def test_it_computes_fake_quantisation(model, int8, calibration, small_images) -> None:
    """PyTorch simulates the float graph; ONNX Runtime runs the INT8 graph.

    Values near the middle of two steps may go either way, and the difference grows from layer to
    layer; so every operator is compared on the same inputs, those that ONNX Runtime found.
    """
    images = small_images[:1]
    found = activations(int8, to_int8(int8, images), optimise=False)
    scale = activation_scale(calibration.scales["image"])
    found["image"] = found["image"] * scale
    values = {name: torch.from_numpy(np.array(value)) for name, value in found.items()}
    for name, simulated in simulate(model, calibration, values).items():
        size = np.abs(found[name]).max()
        error = np.abs(simulated.numpy() - found[name])
        # a step that goes the other way moves a convolution by less than 1 % of its largest value
        assert error.max() <= 0.01 * size, name
        assert (error > 1e-5 * size).mean() < 1e-3, name


def test_int8_is_close_to_float(model, int8, half, small_images) -> None:
    names = heads(model)
    plain = run(model, small_images, names)
    pixels = to_int8(int8, small_images)
    # a narrow random network loses far more than a trained one; 0 dB would be another image
    assert snr_db(plain, run(int8, pixels, names)) > 9
    halved = run(half, pixels, names)
    assert {head.dtype for head in halved} == {np.dtype(np.float16)}
    assert snr_db(plain, halved) > 9
    for quantized in (int8, half):
        rows, count = run(quantized, pixels, ["detections", "num_detections"])
        assert rows.shape[::2] == (3, 7)
        assert rows.dtype == np.float32
        assert (count > 0).all()


# FP16


def test_fp16_graph(half, model) -> None:
    onnx.checker.check_model(half, full_check=True)
    versions = {entry.domain: entry.version for entry in half.opset_import}
    assert versions[""] >= 19
    (function,) = half.functions
    assert {e.version for e in function.opset_import if e.domain == ""} == {versions[""]}
    (before,) = (n for n in model.graph.node if n.op_type == "NMS_OPT_TRT")
    (after,) = (n for n in half.graph.node if n.op_type == "NMS_OPT_TRT")
    assert before == after
    floats = [t.name for t in half.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert floats == [after.input[-1]]  # the priors
    assert "Cast" not in {node.op_type for node in half.graph.node}
    types = {v.name: v.type.tensor_type.elem_type for v in half.graph.value_info}
    assert {types[name] for name in after.input[:-1]} == {TensorProto.FLOAT16}
    assert {types["relu"], types["add_40"]} == {TensorProto.FLOAT16}
    assert list(half.graph.output) == list(model.graph.output)


# Layers kept float


def test_kept_layers_are_float(model, calibration) -> None:
    quantized = quantize(model, calibration, keep_float=["loc.*", "model.layer1.4.0.conv2"])
    made, old = producers(quantized), producers(model)
    for name in heads(model)[:6]:
        assert made[name].input == old[name].input
    for name in heads(model)[6:]:
        assert made[made[name].input[0]].op_type == "DequantizeLinear"
    block = old["add_40"].input[0]
    assert made[block].input == old[block].input
    assert made["add_40"].input == old["add_40"].input  # its addition has nothing to fuse with
    kept = {e.key: e.value for e in quantized.metadata_props}["float_layers"].split()
    assert kept == ["model.layer1.4.0.conv2", *(f"loc.{i}" for i in range(6))]


@pytest.mark.parametrize("float_type", ["fp32", "fp16"])
def test_a_float_first_layer_takes_a_float_image(
    model, calibration, small_images, float_type, tmp_path
) -> None:
    quantized = quantize(model, calibration, keep_float=["model.layer1.0"], float_type=float_type)
    onnx.save(quantized, tmp_path / "float.onnx")
    spec = load_engine("onnxruntime", tmp_path / "float.onnx").input_spec
    assert (spec.dtype, spec.scale) == ("float32", None)
    names = heads(model)
    assert snr_db(run(model, small_images, names), run(quantized, small_images, names)) > 9


def test_a_pattern_without_a_layer_names_the_nearest(model, calibration) -> None:
    with pytest.raises(EngineError, match=r"'locs\.\*'; the nearest of 51 are: loc\.") as caught:
        quantize(model, calibration, keep_float=["conf.*", "locs.*"])
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="nothing is left"):
        quantize(model, calibration, keep_float=["*"])


def test_all_but_the_pairs_is_the_model(model, int8) -> None:
    """Node for node and weight for weight, in the same order."""
    pairs, names, nodes = ("QuantizeLinear", "DequantizeLinear"), {}, []
    for node in int8.graph.node:
        if node.op_type in pairs:
            names[node.output[0]] = names.get(node.input[0], node.input[0])
        else:
            nodes.append(onnx.NodeProto())
            nodes[-1].CopyFrom(node)
            nodes[-1].input[:] = [names.get(name, name) for name in node.input]
    assert nodes == list(model.graph.node)
    count = len(model.graph.initializer)
    assert list(int8.graph.initializer)[:count] == list(model.graph.initializer)


def test_hash_is_that_of_the_file_before_its_surgery(model, exported) -> None:
    """Which has never been through onnx-graphsurgeon."""
    placement = find_placement(model)
    assert network_sha256(model, placement) == network_sha256(onnx.load(exported), placement)


def test_every_layer_has_its_name(model) -> None:
    layers = find_placement(model).layers
    assert len({layer.name for layer in layers}) == len(layers) == 51
    for layer in layers:
        assert layer.weight == f"model.{layer.name}.weight"

"""The INT8 form for ONNX Runtime on CPUs: in integers, and right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from engine.errors import EngineError
from engine.load import load_engine
from engine.model import load_detector
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from engine.quantization.scales import activation_scale, weight_scales
from graph_surgery.files import save
from tests.engine.quantization.test_quantize import (
    activations,
    constants,
    heads,
    run,
    snr_db,
    to_int8,
)


@pytest.fixture(scope="module")
def cpu(model, calibration):
    return quantize(model, calibration, target="cpu")


def test_onnx_runtime_runs_it_in_integers(model, cpu, tmp_path):
    """Every convolution but the heads, every addition, the pooling; nothing of them in float."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(cpu.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    before = Counter(node.op_type for node in model.graph.node)
    assert kinds["QLinearConv"] == before["Conv"] - len(heads(model)) > 30
    assert kinds["QLinearAdd"] == before["Add"] > 10
    assert kinds["Conv"] + kinds["FusedConv"] == len(heads(model))
    assert kinds["Relu"] == 0


def test_its_images_are_those_of_the_other_form(cpu, int8):
    for one in (cpu, int8):
        (image,) = one.graph.input
        assert image.type.tensor_type.elem_type == onnx.TensorProto.INT8
    scales = [{e.key: e.value for e in one.metadata_props}["input_scale"] for one in (cpu, int8)]
    assert scales[0] == scales[1]


def unsigned(x, scale, zero_point):
    steps = torch.clamp(torch.round(x / scale) + zero_point, 0, 255)
    return (steps - zero_point) * scale


def test_it_computes_fake_quantisation(model, cpu, calibration, small_images):
    """Every convolution and addition by PyTorch, from what ONNX Runtime found in front of it."""
    found = activations(cpu, to_int8(cpu, small_images[:1]), optimise=False)
    found |= {name.removesuffix("_of_blocks"): value for name, value in found.items()}
    found["image"] = found["image"] * activation_scale(calibration.scales["image"])
    values = {name: torch.from_numpy(np.array(value)) for name, value in found.items()}
    weights = {name: torch.from_numpy(v.copy()) for name, v in constants(model).items()}
    made = {output: node for node in model.graph.node for output in node.output}
    both = {**calibration.scales, **calibration.sums}

    def scale_of(name):
        node = made.get(name)
        if node is not None and node.op_type == "MaxPool":  # has that of its input
            return scale_of(node.input[0])
        step = activation_scale(both[name])
        positive = node is not None and node.op_type == "Relu"
        return (step * np.float32(127) / np.float32(255), 0) if positive else (step, 128)

    def q(name):
        return unsigned(values[name], *scale_of(name))

    checked = 0
    for node in model.graph.node:
        attribute = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            weight = weights[node.input[1]]
            bias = weights[node.input[2]] if len(node.input) > 2 else None
            known = None if bias is None else bias.numpy()
            scales = weight_scales(weight.numpy(), known, scale_of(node.input[0])[0])
            step = torch.as_tensor(scales).reshape(-1, 1, 1, 1)
            rounded = torch.clamp(torch.round(weight / step), -127, 127) * step
            geometry = attribute["strides"], attribute["pads"][0], attribute["dilations"]
            expected = torch.conv2d(q(node.input[0]), rounded, bias, *geometry)
        elif node.op_type == "Add":
            expected = sum(map(q, node.input))
        else:
            continue
        error = (expected - values[node.output[0]]).abs()
        size = float(values[node.output[0]].abs().max())
        assert error.max() <= 0.01 * size, node.name
        assert (error > 1e-4 * size).float().mean() < 1e-2, node.name
        checked += 1
    assert checked == 51 + 13


def test_integers_are_close_to_what_the_file_says_and_to_float(model, cpu, int8, small_images):
    names, pixels = heads(model), to_int8(cpu, small_images)
    plain = run(model, small_images, names)
    assert snr_db(plain, run(cpu, pixels, names)) > snr_db(plain, run(int8, pixels, names)) - 1
    literal = activations(cpu, pixels[:1], optimise=False)
    optimised = run(cpu, pixels[:1], names)
    assert snr_db([literal[name] for name in names], optimised) > 20


def test_layers_kept_float(model, calibration, small_images):
    kept = quantize(model, calibration, target="cpu", keep_float=["model.layer1.0", "conf.*"])
    onnx.checker.check_model(kept, full_check=True)
    names = heads(model)
    plain = run(model, small_images, names)
    pixels = small_images  # the image's own layer is kept float
    assert snr_db(plain, run(kept, pixels, names)) > 9


def test_what_it_needs_and_what_does_not_take_it(model, calibration, cpu, tmp_path):
    placement = find_placement(model)
    assert len(placement.mains) == 13
    with pytest.raises(EngineError, match=r"no scale for '.*', which --target cpu needs"):
        quantize(model, replace(calibration, sums={}), target="cpu")
    quantize(model, replace(calibration, sums={}))  # the other form does not
    with pytest.raises(EngineError, match="--target cpu: what is not INT8 is float32"):
        quantize(model, calibration, target="cpu", float_type="fp16")
    save(cpu, tmp_path / "cpu.onnx")
    assert load_engine("onnxruntime", tmp_path / "cpu.onnx").manifest["target"] == "cpu"
    with pytest.raises(EngineError, match="INT8 for ONNX Runtime on a CPU"):
        load_detector(tmp_path / "cpu.onnx").require_any_engine()


def test_sums_that_cannot_saturate_are_the_same(model, cpu, small_images):
    """What processors without VNNI are told; where there is VNNI, both ways are exact."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    marked = onnx.ModelProto()
    marked.CopyFrom(cpu)
    names = heads(model)
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    exact = ort.InferenceSession(
        marked.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    pixels = to_int8(cpu, small_images[:1])
    literal = activations(cpu, pixels, optimise=False)
    found = exact.run(names, {"image": pixels})
    assert snr_db([literal[name] for name in names], found) > 20

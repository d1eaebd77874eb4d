"""Models that cannot be quantised, or not with float16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.network import network_sha256
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from tests.support.calibrated import (
    constants,
    heads,
    run,
    write_images,
)


def test_refused_models(model, int8, exported, calibration) -> None:
    def refuse(problem, broken):
        with pytest.raises(EngineError, match=problem) as caught:
            quantize(broken, calibration)
        assert "\n" not in str(caught.value)

    def changed():
        new = onnx.ModelProto()
        new.CopyFrom(model)
        return new

    refuse("no NMS_OPT_TRT node", onnx.load(exported))
    refuse("quantized? already|quantised already", int8)
    unfolded = changed()
    relu = next(node for node in unfolded.graph.node if node.op_type == "Relu")
    channels = constants(model)["model.model.layer1.0.bias"]
    for name in ["bn_a", "bn_b", "bn_c", "bn_d"]:
        unfolded.graph.initializer.append(numpy_helper.from_array(np.abs(channels), name))
    position = list(unfolded.graph.node).index(relu)
    batch_norm = helper.make_node(
        "BatchNormalization", [relu.input[0], "bn_a", "bn_b", "bn_c", "bn_d"], ["bn"], "norm"
    )
    relu.input[0] = "bn"
    unfolded.graph.node.insert(position, batch_norm)
    refuse("batch norm 'norm' is not folded", unfolded)
    sized = changed()
    sized.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    del sized.graph.value_info[:]
    refuse("no fixed channels, height and width", sized)


def test_fp16_refuses_what_does_not_fit(model, calibration) -> None:
    large = onnx.ModelProto()
    large.CopyFrom(model)
    bias = next(t for t in large.graph.initializer if t.name == "model.model.layer1.0.bias")
    value = numpy_helper.to_array(bias).copy()
    value[0] = 1e6
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))
    matching = replace(calibration, model_sha256=network_sha256(large, find_placement(large)))
    with pytest.raises(EngineError, match=r"'model\.model\.layer1\.0\.bias' has values out of"):
        quantize(large, matching, float_type="fp16")
    scales = {**calibration.scales, "relu": 1e6}
    with pytest.raises(EngineError, match="out of the range of float16"):
        quantize(model, replace(calibration, scales=scales))


def test_fp16_refuses_activations_that_do_not_fit(model, calibration, surgered, tmp_path) -> None:
    """Also where they are no input of a layer: here loc, behind a large weight."""
    large = onnx.ModelProto()
    large.CopyFrom(model)
    weight = next(t for t in large.graph.initializer if t.name == "model.loc.2.weight")
    value = numpy_helper.to_array(weight) * np.float32(3e4)
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    path = tmp_path / "large.onnx"
    onnx.save(large, path)
    pixels = np.random.default_rng(6).uniform(-1.8, 2.2, (1, 3, 400, 400)).astype(np.float32)
    found = calibrate(load_detector(path), write_images(tmp_path, pixels))
    head = heads(model)[2]
    reached = np.abs(run(large, pixels, [head])[0]).max()
    assert reached > 65504
    with pytest.raises(EngineError, match=rf"'{head}' reaches {reached // 1000:.0f}.*type fp32"):
        quantize(large, found, float_type="fp16")
    assert quantize(large, found)

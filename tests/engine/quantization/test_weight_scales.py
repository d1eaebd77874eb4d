"""The scales of weights: in all the sizes that weights and biases may have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from engine.quantization.network import network_sha256
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from engine.quantization.scales import weight_scales
from tests.support.calibrated import heads, run, snr_db, to_int8


@example(np.float32([2**-23] + [0] * 5), np.zeros(6, np.float32), 107.0, "fp16")
@given(
    hnp.arrays(np.float32, 6, elements=st.floats(0, 8, width=32) | st.sampled_from([1e-10, 1e-42])),
    hnp.arrays(np.float32, 6, elements=st.floats(-1e4, 1e4, width=32)),
    st.floats(2.0**-24, 1e4, width=32),
    st.sampled_from(["fp32", "fp16"]),
)
def test_every_bias_fits_in_its_steps(largest, bias, input_scale, float_type) -> None:
    weight = np.random.default_rng(0).uniform(-1, 1, (6, 4, 3, 3)).astype(np.float32)
    weight[:, 0, 0, 0] = 1
    weight *= largest[:, None, None, None]
    scales = weight_scales(weight, bias, np.float32(input_scale), float_type)
    step = np.float32(input_scale) * scales
    assert (step >= (np.finfo(np.float32).tiny if float_type == "fp32" else 5.9e-8) * 0.999).all()
    steps = np.abs(bias.astype(np.float64)) / step
    # int32 with the largest sum of products that a 3x3 convolution of 512 channels can have
    assert (steps + 127 * 127 * 512 * 9 < 2**31).all()
    assert float_type == "fp32" or (steps < 65504).all()
    # weights whose own steps do are rounded as finely as without a bias
    own = weight_scales(weight)
    room = {"fp32": 2**31 - 127 * 127 * 512 * 9, "fp16": 65504}[float_type]
    fits = (np.abs(bias) < own * np.float64(input_scale) * 0.5 * room) & (largest > 0)
    fits &= own * min(1.0, input_scale) > 1e-7  # what float16 can hold
    assert (scales[fits] == own[fits]).all()


def test_tiny_weights_keep_their_bias(model, calibration, small_images) -> None:
    """ONNX Runtime, which makes int32 of a bias, computes the same with its optimisation."""
    tiny = onnx.ModelProto()
    tiny.CopyFrom(model)
    values = {t.name: t for t in tiny.graph.initializer}
    name = "model.model.layer1.0"
    weight, bias = (numpy_helper.to_array(values[f"{name}.{w}"]).copy() for w in ("weight", "bias"))
    weight[:4] *= np.float32([1e-10, 1e-42, 0, 1e-4])[:, None, None, None]
    bias[:4] = [3, 2, 1, 4]
    for part, value in (("weight", weight), ("bias", bias)):
        tensor = values[f"{name}.{part}"]
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    matching = replace(calibration, model_sha256=network_sha256(tiny, find_placement(tiny)))
    for float_type in ("fp32", "fp16"):
        quantized = quantize(tiny, matching, float_type=float_type)
        pixels = to_int8(quantized, small_images[:1])
        first = next(n for n in quantized.graph.node if n.op_type == "MaxPool").input[0]
        plain, optimised = (
            run(quantized, pixels, [first, *heads(model)], optimise=optimise)
            for optimise in (False, True)
        )
        wanted = run(tiny, small_images[:1], ["relu"])[0][:, :4]
        for found in (plain, optimised):
            assert np.abs(found[0][:, :4].astype(np.float32) - wanted).max() < 0.05
        assert snr_db(plain[1:], optimised[1:]) > 15


def test_weight_channels_of_zeros() -> None:
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[1, 2] = -6.35
    np.testing.assert_allclose(weight_scales(weight), [1, 0.05], rtol=1e-6)

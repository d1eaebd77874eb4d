"""Scales as they stand in an INT8 graph, from calibrated ones and from weights."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.quantization.thresholds import STEPS

FloatType = Literal["fp32", "fp16"]
"""Type of everything that is not INT8."""

Target = Literal["gpu", "cpu"]
"""What an INT8 file is for: TensorRT, cuDNN and all others, or ONNX Runtime on CPUs alone."""

_BIAS_STEPS = {"fp32": 2**30, "fp16": 60_000}
"""Most steps of a bias. int32 has 2^31, of which the sums of a convolution take 127² a product; in
a float16 graph, ONNX Runtime divides the bias by its step in float16, which ends at 65,504, less
what rounding may add."""
_LEAST_STEP = {"fp32": float(np.finfo(np.float32).tiny), "fp16": 2.0**-24}
"""Least step of a bias, which is a divisor: normal in float32, not 0 in float16."""


def activation_scale(scale: float) -> np.float32:
    """Scale of an activation in the graph: the calibrated one, rounded up to a float16 number.

    So the FP32 and the FP16 graph quantise alike and take the same INT8 images, and rounding (by
    less than 0.1 %) clips nothing that the threshold keeps.

    Raises
    ------
    EngineError
        When it is above the range of float16.
    """
    rounded = np.float32(round_up(np.asarray(scale, np.float64)))
    if not np.isfinite(rounded):
        raise EngineError(f"a scale of {scale} is out of the range of float16")
    return rounded


def weight_scales(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    input_scale: float | np.float32 = 1.0,
    float_type: FloatType = "fp32",
) -> NDArray[np.float32]:
    """Scale of every output channel, float32 [M]: the largest magnitude is the last step.

    Engines may hold a bias in int32 steps of input scale x weight scale. Where weights are so
    small beside it, or all 0, that this takes more steps than there are, their scale is what the
    bias needs. A channel without weights and bias has the scale 1.

    Parameters
    ----------
    weight
        float32 [M, C, kH, kW].
    bias
        float32 [M]; None: there is none.
    input_scale
        Scale of what the convolution reads.
    float_type
        Type of what is not INT8.
    """
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1).astype(np.float64)
    size = np.zeros(len(weight)) if bias is None else np.abs(bias.astype(np.float64))
    scales = np.maximum(largest / STEPS, size / _BIAS_STEPS[float_type] / input_scale)
    scales[scales == 0] = 1
    least = _LEAST_STEP[float_type] / min(1.0, float(input_scale))
    scaled: NDArray[np.float32] = np.maximum(scales, least).astype(np.float32)
    return scaled


def round_up(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Least float16 that is not below."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
        return np.where(rounded < values, np.nextafter(rounded, np.float16(np.inf)), rounded)

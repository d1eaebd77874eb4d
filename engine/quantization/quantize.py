"""From a surgered FP32 detector and its calibration to the INT8 detector: explicit Q/DQ.

The form is the one that every version of TensorRT and ONNX Runtime reads: activations symmetric
per tensor, weights symmetric per output channel, as float weights followed by QuantizeLinear and
DequantizeLinear; zero points 0; biases float. Where, says `engine.quantization.placement`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from engine.errors import EngineError, one_line
from engine.protocol import INPUT_SCALE_KEY
from engine.quantization.cache import Calibration
from engine.quantization.placement import Placement, find_placement
from engine.quantization.thresholds import STEPS
from graph_surgery.nms_function import DOMAIN, nms_function

FloatType = Literal["fp32", "fp16"]
"""Type of everything that is not INT8."""

_FP16_LARGEST = float(np.finfo(np.float16).max)
_BIAS_STEPS = {"fp32": 2**30, "fp16": 60_000}
"""Most steps of a bias. int32 has 2^31, of which the sums of a convolution take 127² a product; in
a float16 graph, ONNX Runtime divides the bias by its step in float16, which ends at 65,504, less
what rounding may add."""
_LEAST_STEP = {"fp32": float(np.finfo(np.float32).tiny), "fp16": 2.0**-24}
"""Least step of a bias, which is a divisor: normal in float32, not 0 in float16."""

_FP16_OPSET = 19
"""First opset whose QuantizeLinear and DequantizeLinear take float16 (ONNX operator changelog)."""


def quantize(
    model: onnx.ModelProto,
    calibration: Calibration,
    *,
    float_type: FloatType = "fp32",
    keep_float: Sequence[str] = (),
) -> onnx.ModelProto:
    """Quantise a detector.

    Parameters
    ----------
    model
        Surgered FP32 detector. It is not changed.
    calibration
        Its scales.
    float_type
        ``fp16``: everything outside INT8 becomes float16, except the priors and the inside and
        the outputs of NMS_OPT_TRT.
    keep_float
        Shell patterns of layer names (``loc.*``) to leave unquantised.

    Returns
    -------
    ModelProto
        The image input keeps its name and becomes int8, with the metadata key ``input_scale``;
        where its convolution is kept float, it stays float32.

    Raises
    ------
    EngineError
        When the calibration is another model's, a pattern matches no layer, no layer is left to
        quantise, or a value, also an activation of the calibration images, does not fit in float16.
    """
    placement = find_placement(model)
    calibration.check(model, placement)
    if float_type == "fp16":
        _check_fp16(calibration)
    kept = placement.match(keep_float)
    layers = frozenset(range(len(placement.layers))) - kept
    if not layers:
        raise EngineError("every layer is kept float: nothing is left to quantise")
    if float_type == "fp16":
        model = _with_opset(model, _FP16_OPSET)
        placement = find_placement(model)
    new = insert_qdq(model, placement, calibration.scales, layers, float_type)
    image_scale = _int8_input(new, placement)
    if float_type == "fp16":
        _to_fp16(new, placement)
    facts = {
        "float_type": float_type,
        "float_layers": " ".join(placement.layers[i].name for i in sorted(kept)),
        "calibration_method": calibration.method,
        "calibration_narrowed": " ".join(calibration.narrowed),
        "calibration_images": str(calibration.images),
        "calibration_empty_images": str(calibration.empty_images),
        "calibration_images_sha256": calibration.images_sha256,
        "float_network_sha256": calibration.model_sha256,
        "preprocessing_sha256": calibration.preprocessing_sha256,
    }
    if image_scale is not None:
        facts[INPUT_SCALE_KEY] = repr(image_scale)
    known = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(new, known | facts)
    new.graph.ClearField("value_info")
    try:
        onnx.checker.check_model(new, full_check=True)
        new = onnx.shape_inference.infer_shapes(new, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"the INT8 graph is invalid: {one_line(error)}") from error
    return new


def insert_qdq(
    model: onnx.ModelProto,
    placement: Placement,
    scales: Mapping[str, float],
    layers: Iterable[int],
    float_type: FloatType = "fp32",
) -> onnx.ModelProto:
    """Copy a model with Q/DQ pairs at some layers; its inputs and outputs stay as they are.

    Parameters
    ----------
    scales
        Of every tensor that these layers read.
    layers
        Indices into ``placement.layers``.
    float_type
        Type that what is not INT8 will have; here it stays float32.
    """
    chosen = set(layers)
    new = onnx.ModelProto()
    new.CopyFrom(model)
    graph = new.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    before: dict[int, list[onnx.NodeProto]] = {}  # new nodes, by the node that they precede
    done: dict[str, str] = {}
    read: dict[int, np.float32] = {}  # scale of what a convolution reads, by its node
    for point in placement.points:
        if point.layer in chosen:
            read[point.node] = activation_scale(scales[point.tensor])
            if point.tensor not in done:
                pair = _pair(graph, point.tensor, read[point.node])
                before.setdefault(point.node, []).extend(pair)
                done[point.tensor] = pair[1].output[0]
            graph.node[point.node].input[point.input] = done[point.tensor]
    for index in sorted(chosen):
        layer = placement.layers[index]
        value = numpy_helper.to_array(weights[layer.weight])
        scale = weight_scales(value, layer.bias, read[layer.node], float_type)
        pair = _pair(graph, layer.weight, scale, axis=0)
        before.setdefault(layer.node, []).extend(pair)
        graph.node[layer.node].input[1] = pair[1].output[0]
    nodes = [n for i, node in enumerate(graph.node) for n in (*before.get(i, ()), node)]
    graph.ClearField("node")
    graph.node.extend(nodes)
    return new


def activation_scale(scale: float) -> np.float32:
    """Scale of an activation in the graph: the calibrated one, rounded up to a float16 number.

    So the FP32 and the FP16 graph quantise alike and take the same INT8 images, and rounding (by
    less than 0.1 %) clips nothing that the threshold keeps.

    Raises
    ------
    EngineError
        When it is above the range of float16.
    """
    rounded = np.float32(_round_up(np.asarray(scale, np.float64)))
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


def _check_fp16(calibration: Calibration) -> None:
    """Refuse a model whose activations are out of the range of float16."""
    over = {n: value for n, value in calibration.largest.items() if not value <= _FP16_LARGEST}
    if over:
        worst = max(over, key=lambda name: over[name])
        raise EngineError(
            f"tensor {worst!r} reaches {over[worst]:.6g} on the calibration images"
            f"{f', and {len(over) - 1} more are' if len(over) > 1 else ', which is'} out of the "
            f"range of float16, {_FP16_LARGEST:,.0f}: take --float-type fp32"
        )


def _round_up(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Least float16 that is not below."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
        return np.where(rounded < values, np.nextafter(rounded, np.float16(np.inf)), rounded)


def _pair(
    graph: onnx.GraphProto,
    tensor: str,
    scale: np.float32 | NDArray[np.float32],
    axis: int | None = None,
) -> list[onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear of a tensor; scale and zero point go into the graph."""
    names = [f"{tensor}_{part}" for part in ("scale", "zero_point", "quantized", "dequantized")]
    scale_name, zero_name, quantized, dequantized = names
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.asarray(scale), scale_name),
            numpy_helper.from_array(np.zeros(np.shape(scale), np.int8), zero_name),
        ]
    )
    return [
        helper.make_node(kind, [source, scale_name, zero_name], [target], target, axis=axis)
        for kind, source, target in (
            ("QuantizeLinear", tensor, quantized),
            ("DequantizeLinear", quantized, dequantized),
        )
    ]


def _int8_input(model: onnx.ModelProto, placement: Placement) -> float | None:
    """Let the image come in as INT8, if it is quantised at all; its scale."""
    graph = model.graph
    for quantise in graph.node:
        if quantise.op_type == "QuantizeLinear" and quantise.input[0] == placement.image:
            break
    else:
        return None
    graph.node.remove(quantise)
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == quantise.output[0]:
            node.input[0] = placement.image
            break
    image = next(value for value in graph.input if value.name == placement.image)
    image.type.tensor_type.elem_type = TensorProto.INT8
    scale = next(t for t in graph.initializer if t.name == quantise.input[1])
    return float(numpy_helper.to_array(scale))


def _with_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Convert a surgered model to an opset, unless it has that or a later one."""
    entry = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if entry.version >= opset:
        return model
    (nms,) = (node for node in model.graph.node if node.domain == DOMAIN)
    # the converter knows standard operators alone: the node is taken out for it
    new = onnx.ModelProto()
    new.CopyFrom(model)
    graph = new.graph
    graph.node.remove(nms)
    kept = [value for value in model.graph.output if value.name not in nms.output]
    known = {value.name: value for value in graph.value_info}
    heads = dict.fromkeys(nms.input[:-1])
    del graph.output[:], new.functions[:], new.opset_import[:]
    graph.output.extend([*(known[name] for name in heads), *kept])
    new.opset_import.append(helper.make_opsetid("", entry.version))
    try:
        converted = version_converter.convert_version(new, opset)
    except (RuntimeError, version_converter.ConvertError) as error:
        text = one_line(error)
        raise EngineError(f"cannot convert opset {entry.version} to {opset}: {text}") from error
    graph.CopyFrom(converted.graph)
    graph.node.append(nms)
    del graph.output[:]
    graph.output.extend(model.graph.output)
    others = [e for e in model.opset_import if e.domain not in ("", "ai.onnx")]
    del new.opset_import[:]
    new.opset_import.extend([helper.make_opsetid("", opset), *others])
    new.ir_version = max(model.ir_version, converted.ir_version)
    sigmoid = any(a.name == "confSigmoid" and a.i == 1 for a in nms.attribute)
    new.functions.append(nms_function((len(nms.input) - 1) // 2, opset, sigmoid=sigmoid))
    return new


def _to_fp16(model: onnx.ModelProto, placement: Placement) -> None:
    """Turn everything in front of NMS_OPT_TRT that is float32 into float16."""
    graph = model.graph
    (nms,) = (node for node in graph.node if node.domain == DOMAIN)
    scales = {n.input[1] for n in graph.node if n.op_type == "QuantizeLinear"}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in nms.input:
            value = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                half = _round_up(value) if tensor.name in scales else value.astype(np.float16)
            if not np.isfinite(half).all():
                raise EngineError(f"{tensor.name!r} has values out of the range of float16")
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    image = next(value for value in graph.input if value.name == placement.image)
    if image.type.tensor_type.elem_type == TensorProto.FLOAT:
        half_image = f"{placement.image}_fp16"
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == placement.image:
                    node.input[index] = half_image
        cast = helper.make_node(
            "Cast", [placement.image], [half_image], half_image, to=TensorProto.FLOAT16
        )
        graph.node.insert(0, cast)
    for value in graph.output:
        if value.name not in nms.output and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16

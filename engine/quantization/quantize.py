"""From a surgered FP32 detector and its calibration to the INT8 detector: explicit Q/DQ.

The form is the one that every version of TensorRT and ONNX Runtime reads: activations symmetric
per tensor, weights symmetric per output channel, as float weights followed by QuantizeLinear and
DequantizeLinear; zero points 0; biases float. Where, says `engine.quantization.placement`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from engine.errors import EngineError
from engine.protocol import CORRECTION_KEY, INPUT_SCALE_KEY, TARGET_KEY
from engine.quantization.bias import Biases, set_biases
from engine.quantization.cache import Calibration
from engine.quantization.cpu import insert_for_cpu, shift_image
from engine.quantization.placement import Placement, find_placement
from engine.quantization.qdq import insert_qdq
from engine.quantization.scales import FloatType, Target, round_up
from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, export_graph, fix, import_graph, namer, value
from graph_surgery.nms_function import DOMAIN, add_definition
from graph_surgery.pattern import read_surgered
from graph_surgery.protobuf import check, convert, with_types

_READ_INT8 = ("QuantizeLinear", "DequantizeLinear", "Shape", "Size")
"""What reads an INT8 image as what it stands for, or does not look at its pixels."""

_FP16_LARGEST = float(np.finfo(np.float16).max)
_FP16_OPSET = 19
"""First opset whose QuantizeLinear and DequantizeLinear take float16 (ONNX operator changelog)."""


def quantize(
    model: onnx.ModelProto,
    calibration: Calibration,
    *,
    float_type: FloatType = "fp32",
    keep_float: Sequence[str] = (),
    target: Target = "gpu",
    biases: Biases | None = None,
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
    target
        ``cpu``: the form of `engine.quantization.cpu`, for ONNX Runtime on CPUs alone. INT8 images
        are the same.
    biases
        Of `engine.quantization.bias.correct_biases` for this float type and target, which layers
        that stay float do not take; None: those of the model.

    Returns
    -------
    ModelProto
        The image input keeps its name and becomes int8, with the metadata key ``input_scale``;
        where its convolution is kept float, it stays float32.

    Raises
    ------
    EngineError
        When the calibration is another model's, a pattern matches no layer, no layer is left to
        quantise, the image is read both in INT8 and in float, or a value, also an activation of the
        calibration images, does not fit in float16.
    """
    placement = find_placement(model)
    calibration.check(model, placement)
    if float_type == "fp16":
        if target == "cpu":
            raise EngineError("--target cpu: what is not INT8 is float32 there, not float16")
        _check_fp16(calibration)
    kept = placement.match(keep_float)
    layers = frozenset(range(len(placement.layers))) - kept
    if not layers:
        raise EngineError("every layer is kept float: nothing is left to quantise")
    try:
        if float_type == "fp16":
            model = _with_opset(model, _FP16_OPSET)
        graph = import_graph(model)
    except SurgeryError as error:
        raise EngineError(str(error)) from error
    if float_type == "fp16":
        _store_constants(graph)
    placement = set_biases(graph, placement, biases or {}, layers)
    if target == "cpu":
        insert_for_cpu(graph, placement, calibration.scales, calibration.sums, layers)
        image_scale = shift_image(graph, placement.image)
    else:
        insert_qdq(graph, placement, calibration.scales, layers, float_type)
        image_scale = _int8_input(graph, placement)
    _check_image(graph, placement, layers)
    if float_type == "fp16":
        _to_fp16(graph, placement)
    new = export_graph(graph.cleanup(recurse_functions=False), model)
    facts = {
        "float_type": float_type,
        "float_layers": " ".join(placement.layers[i].name for i in sorted(kept)),
        "calibration_method": calibration.method,
        "calibration_images": str(calibration.images),
        "calibration_empty_images": str(calibration.empty_images),
        "calibration_images_sha256": calibration.images_sha256,
        "float_network": calibration.model,
        "float_network_sha256": calibration.model_sha256,
        "preprocessing_sha256": calibration.preprocessing_sha256,
        **({} if biases is None else {CORRECTION_KEY: "bias"}),
    }
    if target == "cpu":
        facts[TARGET_KEY] = target
    if image_scale is not None:
        facts[INPUT_SCALE_KEY] = repr(image_scale)
    known = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(new, known | facts)
    new.graph.ClearField("value_info")
    try:
        check(new)
        return with_types(new)
    except SurgeryError as error:
        raise EngineError(f"the INT8 graph is invalid: {error}") from error


def is_outdated(path: Path, quantized: onnx.ModelProto) -> bool:
    """Tell whether a file is INT8 of the same model file as it was before."""
    try:
        before = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError):  # nothing, or something else
        return False
    known, facts = (
        {entry.key: entry.value for entry in model.metadata_props} for model in (before, quantized)
    )
    same_file = facts["float_network"] and known.get("float_network") == facts["float_network"]
    return bool(same_file) and known["float_network_sha256"] != facts["float_network_sha256"]


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


def _int8_input(graph: gs.Graph, placement: Placement) -> float | None:
    """Let the image come in as INT8, if it is quantised at all; its scale."""
    (image,) = (tensor for tensor in graph.inputs if tensor.name == placement.image)
    for quantise in image.outputs:
        if quantise.op == "QuantizeLinear":
            image.dtype = np.dtype(np.int8)
            quantise.o().inputs[0] = image
            return float(quantise.inputs[1].values)
    return None


def _check_image(graph: gs.Graph, placement: Placement, layers: Iterable[int]) -> None:
    """Refuse an INT8 image that something reads as if it were float.

    Raises
    ------
    EngineError
        Says what reads it how.
    """
    (image,) = (tensor for tensor in graph.inputs if tensor.name == placement.image)
    in_float = [node for node in image.outputs if node.op not in _READ_INT8]
    if in_float and image.dtype == np.int8:
        readers = (p.layer for p in placement.points if p.tensor == image.name)
        names = dict.fromkeys(placement.layers[layer].name for layer in readers if layer in layers)
        raise EngineError(
            f"the image {image.name!r} is read in INT8 by {', '.join(names)} and in float by "
            f"{describe(in_float[0])}, and it can be but one: keep it float with "
            + " ".join(f"--keep-float '{name}'" for name in names)
        )


def _with_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Convert a surgered model to an opset, unless it has that or a later one."""
    graph = import_graph(model)
    if graph.opset >= opset:
        return model
    (nms,) = (node for node in graph.nodes if node.domain == DOMAIN)
    attributes = read_surgered(graph, nms).attributes
    names = [tensor.name for tensor in graph.outputs]
    made = {tensor.name: tensor.copy() for tensor in nms.outputs}
    # the converter knows standard operators alone: the node is taken out for it
    heads, priors = nms.inputs[:-1], nms.inputs[-1].copy()
    graph.outputs = [*heads, *(one for one in graph.outputs if one.name not in made)]
    graph.functions = [function for function in graph.functions if function.domain != DOMAIN]
    graph.import_domains = [one for one in graph.import_domains if one.domain != DOMAIN]
    body = convert(export_graph(graph.cleanup(recurse_functions=False), model), opset)
    new = import_graph(body)
    tensors = new.tensors() | made
    inputs = [*(tensors[tensor.name] for tensor in heads), priors]
    new.nodes.append(nms.copy(inputs=inputs, outputs=list(made.values())))
    add_definition(new, attributes)
    new.outputs = [tensors[name] for name in names]
    return export_graph(new, body)


def _store_constants(graph: gs.Graph) -> None:
    """Store what float32 constants are computed to: their nodes would make float32 for ever."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.dtype == np.float32:
            values = value(graph, tensor)
            if values is not None:
                fix(tensor, values)
    graph.cleanup(recurse_functions=False)


def _to_fp16(graph: gs.Graph, placement: Placement) -> None:
    """Turn everything in front of NMS_OPT_TRT that is float32 into float16."""
    (nms,) = (node for node in graph.nodes if node.domain == DOMAIN)
    scales = {node.inputs[1].name for node in graph.nodes if node.op == "QuantizeLinear"}
    kept = {tensor.name for tensor in (*nms.inputs, *nms.outputs)}
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and name not in kept:
            values = np.asarray(value(graph, tensor))
            with np.errstate(over="ignore"):
                half = round_up(values) if name in scales else values.astype(np.float16)
            if not np.isfinite(half).all():
                raise EngineError(f"{name!r} has values out of the range of float16")
            fix(tensor, half)
    for output in graph.outputs:
        if output.name not in kept and output.dtype == np.float32:
            output.dtype = np.dtype(np.float16)
    (image,) = (tensor for tensor in graph.inputs if tensor.name == placement.image)
    if image.dtype == np.float32:
        half_image = gs.Variable(namer(graph)(f"{image.name}_fp16"))
        for node in list(image.outputs):
            node.inputs = [half_image if tensor is image else tensor for tensor in node.inputs]
        name, attributes = half_image.name, {"to": TensorProto.FLOAT16}
        graph.layer(op="Cast", name=name, inputs=[image], outputs=[half_image], attrs=attributes)

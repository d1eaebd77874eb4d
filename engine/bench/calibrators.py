"""TensorRT's calibrators beside ours: ``python -m engine.bench calibrators FP32.onnx …``.

Each sees the same images through the same network, from the image to the heads. Its scales go into
the same Q/DQ graph, whose mAP ONNX Runtime finds: what differs is the choice of the scales alone.
TensorRT has calibrators up to release 10; the route does not use them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from engine.backends.cuda import Stream, use_gpu
from engine.backends.tensorrt.module import import_tensorrt
from engine.bench.calibration import mean_precision
from engine.comparison.compare import load_truth
from engine.data.preprocessed import PreprocessedSet, load_preprocessed
from engine.errors import EngineError
from engine.model import Detector, load_detector
from engine.quantization.cache import Calibration, parse_trt
from engine.quantization.calibration import calibrate_all
from engine.quantization.network import heads_model
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from engine.support.environment import circumstances, now
from engine.support.files import write_json
from graph_surgery.files import save
from graph_surgery.protobuf import types

CALIBRATORS = {
    "entropy 2": "IInt8EntropyCalibrator2",
    "entropy": "IInt8EntropyCalibrator",
    "minmax": "IInt8MinMaxCalibrator",
}
"""TensorRT's classes, by the names that its documentation gives them."""


def bench(
    model: Annotated[Path, typer.Argument(help="Surgered FP32 .onnx.")],
    *,
    data: Annotated[Path, typer.Option(help="Float32 calibration images.")],
    val: Annotated[Path, typer.Option(help="Float32 validation images.")],
    annotations: Annotated[Path, typer.Option(help="COCO annotations of those.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
) -> None:
    """Measure scales and mAP of every calibrator, and write the figures to a JSON file."""
    detector = load_detector(model)
    source, judged = (load_preprocessed(folder, detector.input) for folder in (data, val))
    truth = load_truth(annotations, judged.files)
    ours = calibrate_all(detector, source)
    first = next(iter(ours.values()))
    found = {f"ours, {method}": calibration for method, calibration in ours.items()}
    missing: dict[str, list[str]] = {}
    for name, kind in CALIBRATORS.items():
        scales = tensorrt_scales(detector, source, kind)
        missing[name] = [tensor for tensor in first.scales if tensor not in scales]
        taken = {tensor: scales.get(tensor, own) for tensor, own in first.scales.items()}
        found[f"TensorRT, {name}"] = replace(first, scales=taken)
    document: dict[str, Any] = {
        **circumstances("numpy", "onnx", "onnxruntime"),
        "tensorrt": str(import_tensorrt("tensorrt").__version__),
        "model": model.name,
        "images": first.images,
        "fp32": mean_precision(model, judged, truth),
        "not_in_tensorrts_cache": missing,
        "calibrators": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, calibration in found.items():
            path = Path(scratch) / "int8.onnx"
            save(quantize(detector.model, calibration), path)
            precision = mean_precision(path, judged, truth)
            low, middle, high = _over(calibration, ours["minmax"])
            document["calibrators"][name] = {
                "mAP": precision,
                "over_minmax": [low, middle, high],
                "scales": dict(calibration.scales),
            }
            typer.echo(
                f"{name}: mAP {precision:.4f}, scales over those of the largest values: "
                f"{low:.3f} to {high:.3f}, median {middle:.3f}"
            )
            write_json(output, document | {"finished": now()})


def _over(calibration: Calibration, largest: Calibration) -> tuple[float, float, float]:
    """Least, median and greatest ratio of the scales to those of another calibration."""
    ratios = [scale / largest.scales[name] for name, scale in calibration.scales.items()]
    return float(min(ratios)), float(np.median(ratios)), float(max(ratios))


def tensorrt_scales(detector: Detector, images: PreprocessedSet, kind: str) -> Mapping[str, float]:
    """Let TensorRT calibrate a detector's network.

    Parameters
    ----------
    detector
        Surgered FP32 detector with a dynamic batch.
    images
        float32 images of its input; they run one at a time.
    kind
        TensorRT's class, one of `CALIBRATORS`.

    Returns
    -------
    mapping
        Tensor name to the real value of one INT8 step.

    Raises
    ------
    EngineError
        When this TensorRT has no such calibrator, refuses the network, or writes no cache.
    """
    trt = import_tensorrt("tensorrt")
    if not hasattr(trt, kind):
        raise EngineError(f"TensorRT {trt.__version__} has no {kind}")
    use_gpu(0)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    part = heads_model(detector.model, find_placement(detector.model))
    known = types(detector.model)
    for head in part.graph.output:
        head.CopyFrom(known[head.name])  # TensorRT's parser infers none
    if not parser.parse(part.SerializeToString()):
        raise EngineError(f"{detector.path}: TensorRT: {parser.get_error(0).desc()}")
    shape = (1, *detector.input.shape)
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    config.builder_optimization_level = 0  # the plan is thrown away
    profile = builder.create_optimization_profile()
    profile.set_shape(detector.input.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    config.set_calibration_profile(profile)
    with closing(Stream()) as stream:
        calibrator = _calibrator(getattr(trt, kind), images, stream, shape)
        config.int8_calibrator = calibrator
        builder.build_serialized_network(network, config)
    if not calibrator.cache:
        raise EngineError(f"{detector.path}: {kind} wrote no cache; see TensorRT's messages above")
    return parse_trt(calibrator.cache.decode())


def _calibrator(base: Any, images: PreprocessedSet, stream: Stream, shape: tuple[int, ...]) -> Any:
    """Make a calibrator of a class of TensorRT's that streams images."""
    address = stream.device(4 * int(np.prod(shape)))

    class Calibrator(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # TensorRT's classes want it called so
            self.cache, self._next = b"", 0

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, _names: list[str]) -> list[int] | None:
            if self._next == len(images.files):
                return None
            image = images.load([self._next]).astype(np.float32, copy=False)
            self._next += 1
            stream.upload(address, np.ascontiguousarray(image))
            stream.synchronize()
            return [address]

        def read_calibration_cache(self) -> bytes | None:
            return None

        def write_calibration_cache(self, cache: Any) -> None:
            self.cache = bytes(cache)

    return Calibrator()

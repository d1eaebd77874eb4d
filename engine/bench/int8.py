"""INT8 against FP32 in ONNX Runtime on this CPU: ``python -m engine.bench int8 FP32.onnx…``.

For every model, in one run, on the same images and threads: milliseconds per image of FP32 and INT8
in both forms (``engine quantize --target``) in turns, and of calibration against the bare FP32
inference.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.data.preprocessed import PreprocessedSet, load_preprocessed, quantize_images
from engine.errors import EngineError
from engine.load import load_engine
from engine.model import Detector, load_detector
from engine.protocol import Session
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from engine.quantization.scales import Target
from engine.support.environment import circumstances, now
from engine.support.files import write_json
from graph_surgery.files import save


def bench(
    models: Annotated[list[Path], typer.Argument(help="Surgered FP32 .onnx files.")],
    *,
    data: Annotated[
        list[Path], typer.Option(help="Float32 images of 'harness preprocess', for each model.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    images: Annotated[int, typer.Option(min=2, help="Images of a turn.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians count.")] = 5,
) -> None:
    """Measure INT8 and calibration, and write the figures to a JSON file."""
    if len(models) != len(data):
        raise EngineError(f"{len(models)} models, but {len(data)} folders of images")
    document: dict[str, Any] = {
        **circumstances("numpy", "onnx", "onnxruntime"),
        "models": {},
    }
    for model, folder in zip(models, data, strict=True):
        found = measure(model, folder, images, rounds)
        document["models"][model.name] = found
        typer.echo(
            f"{model.name}: FP32 {found['fp32_ms']:.1f} ms, INT8 {found['int8_ms']:.1f} ms, "
            f"for CPUs {found['int8_cpu_ms']:.1f} ms; FP32 / INT8 {found['fp32_over_int8']:.2f}, "
            f"for CPUs {found['fp32_over_int8_cpu']:.2f}; calibration "
            f"{found['calibration_ms']:.1f} ms, {found['calibration_over_fp32']:.2f} of FP32"
        )
    write_json(output, document | {"finished": now()})


def measure(model: Path, folder: Path, count: int, rounds: int) -> dict[str, object]:
    """Measure one model.

    Parameters
    ----------
    model
        Surgered FP32 ONNX file.
    folder
        Its preprocessed images.
    count
        Images of a turn, one by one.
    rounds
        Turns of FP32, INT8 and calibration.

    Returns
    -------
    dict
        Medians over the turns in milliseconds per image, their ratios, and every turn.
    """
    detector, float_engine = load_detector(model), load_engine("onnxruntime", model)
    source = load_preprocessed(folder, float_engine.input_spec)
    if count > len(source.files):
        raise EngineError(f"{count} images asked for, {folder} has {len(source.files)}")
    batches = [source.load([index]).astype(np.float32, copy=False) for index in range(count)]
    calibration = calibrate(detector, source, limit=count)  # a turn to warm up, too
    targets: tuple[Target, ...] = ("gpu", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        engines = {}
        for target in targets:
            path = Path(scratch) / f"{target}.onnx"
            save(quantize(detector.model, calibration, target=target), path)
            engines[target] = load_engine("onnxruntime", path)
    int8_batches = [quantize_images(batch, engines["cpu"].input_spec) for batch in batches]
    sides: dict[str, tuple[Session, Sequence[NDArray[np.generic]]]] = {
        "fp32": (float_engine.session(), batches),
        "int8": (engines["gpu"].session(), int8_batches),
        "int8_cpu": (engines["cpu"].session(), int8_batches),
    }
    turns: dict[str, list[float]] = {name: [] for name in (*sides, "calibration")}
    for session, inputs in sides.values():
        _infer(session, inputs)
    for _ in range(rounds):
        for name, (session, inputs) in sides.items():
            turns[name].append(_infer(session, inputs))
        turns["calibration"].append(_calibrate(detector, source, count))
    medians = {name: statistics.median(values) for name, values in turns.items()}
    return {
        "input": list(float_engine.input_spec.shape),
        "threads": float_engine.manifest["threads"],
        "images": count,
        **{f"{name}_ms": value for name, value in medians.items()},
        "fp32_over_int8": medians["fp32"] / medians["int8"],
        "fp32_over_int8_cpu": medians["fp32"] / medians["int8_cpu"],
        "calibration_over_fp32": medians["calibration"] / medians["fp32"],
        "turns_ms": turns,
    }


def _infer(session: Session, batches: Sequence[NDArray[np.generic]]) -> float:
    """Milliseconds per image."""
    start = time.perf_counter()
    for batch in batches:
        session.infer(batch)
    return 1e3 * (time.perf_counter() - start) / len(batches)


def _calibrate(detector: Detector, source: PreprocessedSet, count: int) -> float:
    """Milliseconds per image of a calibration less those for hashing the model.

    The time for all images less that for one, over the images between, so that what happens once
    does not count.
    """
    start = time.perf_counter()
    calibrate(detector, source, limit=1)
    middle = time.perf_counter()
    calibrate(detector, source, limit=count)
    end = time.perf_counter()
    return 1e3 * ((end - middle) - (middle - start)) / (count - 1)

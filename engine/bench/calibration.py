"""INT8 mAP by calibration set and method: ``python -m engine.bench calibration FP32.onnx …``.

The sets are made of the pictures of one: as they are, on white and on black, at night, one alone,
and so on, and some without anything to see.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.bench.accuracy import detect
from engine.comparison.agreement import find_agreement
from engine.comparison.compare import Truth, load_truth
from engine.data.coco import coco_stats
from engine.data.preprocessed import (
    MEAN,
    STD,
    PreprocessedSet,
    load_preprocessed,
)
from engine.model import Detector, load_detector
from engine.protocol import InputSpec
from engine.quantization.calibration import calibrate_all
from engine.quantization.quantize import quantize
from engine.quantization.thresholds import METHODS
from engine.support.environment import circumstances, now
from engine.support.files import write_json
from graph_surgery.files import save

Images = NDArray[np.float32]
"""[N, 3, H, W], normalised."""

_MEAN, _STD = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))


def _middle(images: Images, colour: float) -> Images:
    """The middle ninth of each, and a colour around it."""
    new = np.broadcast_to((colour - _MEAN) / _STD, images.shape).copy()
    rows, columns = (
        slice((size - size // 3) // 2, (size + size // 3) // 2) for size in images.shape[2:]
    )
    new[:, :, rows, columns] = images[:, :, rows, columns]
    return new


def _shrunk(images: Images, colour: float) -> Images:
    """Each at a third of its size, in the middle of a colour."""
    new = np.broadcast_to((colour - _MEAN) / _STD, images.shape).copy()
    small = images[:, :, 1::3, 1::3]
    top, left = (
        (size - part) // 2 for size, part in zip(images.shape[2:], small.shape[2:], strict=True)
    )
    new[:, :, top : top + small.shape[2], left : left + small.shape[3]] = small
    return new


def _letterbox(images: Images) -> Images:
    """Each at half its height, between black bars."""
    new = np.broadcast_to(-_MEAN / _STD, images.shape).copy()
    half = images[:, :, ::2]
    top = (images.shape[2] - half.shape[2]) // 2
    new[:, :, top : top + half.shape[2]] = half
    return new


def _busiest(images: Images) -> Images:
    """The one with the largest differences between neighbours."""
    change = np.abs(np.diff(images, axis=3)).mean(axis=(1, 2, 3))
    return images[[int(change.argmax())]]


def _colours(images: Images, noise: float = 0.0) -> Images:
    """As many pictures of one colour each, with noise."""
    random = np.random.default_rng(0)
    pixels = random.uniform(0, 1, (len(images), 3, 1, 1))
    pixels = pixels + random.normal(0, noise, images.shape) if noise else pixels
    return _from_pixels(np.broadcast_to(pixels, images.shape))


def _gradients(images: Images) -> Images:
    """As many pictures that go from one colour to another."""
    ends = np.random.default_rng(1).uniform(0, 1, (2, len(images), 3, 1, 1))
    way = np.linspace(0, 1, images.shape[3])
    return _from_pixels(np.broadcast_to(ends[0] + (ends[1] - ends[0]) * way, images.shape))


def _from_pixels(pixels: NDArray[np.floating]) -> Images:
    images: Images = ((np.clip(pixels, 0, 1) - _MEAN) / _STD).astype(np.float32)
    return images


SETS: dict[str, Callable[[Images], Images]] = {
    "as they are": lambda images: images,
    "middle ninth of each on white": lambda images: _middle(images, 1),
    "each at a ninth of its size on white": lambda images: _shrunk(images, 1),
    "middle ninth of each on black": lambda images: _middle(images, 0),
    "night (pixels / 8)": lambda images: _from_pixels((images * _STD + _MEAN) / 8),
    "letterboxed": _letterbox,
    "one picture": lambda images: images[:1],
    "one picture 500 times": lambda images: np.broadcast_to(images[:1], (500, *images.shape[1:])),
    "white ones and the busiest": lambda images: np.concatenate(
        [_from_pixels(np.ones_like(images[1:])), _busiest(images)]
    ),
}
"""Calibration sets on which the default must keep the accuracy, by what is done to the pictures."""

EMPTY_SETS: dict[str, Callable[[Images], Images]] = {
    "flat colours": _colours,
    "flat colours with noise": lambda images: _colours(images, 0.03),
    "gradients": _gradients,
}
"""Sets without anything to see, of which calibration warns."""


def write_set(images: Images, folder: Path) -> PreprocessedSet:
    """Write images as a set; equal ones in a row are one file."""
    files: list[str] = []
    for index, image in enumerate(images):
        if index and np.array_equal(image, images[index - 1]):
            files.append(files[-1])
        else:
            files.append(f"{index:03}.png")
            np.save(folder / f"{files[-1]}.npy", image)
    spec = InputSpec("image", (3, *images.shape[2:]), "float32")
    return PreprocessedSet(folder, tuple(files), spec, {})


def mean_precision(model: Path, images: PreprocessedSet, truth: Truth) -> float:
    """COCO mAP of a detector in ONNX Runtime on all images of a float32 set."""
    rows = detect(model, images)
    return coco_stats(truth.content, truth.images, rows)["AP"]


def bench(
    model: Annotated[Path, typer.Argument(help="Surgered FP32 .onnx.")],
    *,
    data: Annotated[Path, typer.Option(help="Float32 calibration images.")],
    val: Annotated[Path, typer.Option(help="Float32 validation images.")],
    annotations: Annotated[Path, typer.Option(help="COCO annotations of those.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
) -> None:
    """Measure the mAP of every set and method, and write the figures to a JSON file."""
    detector = load_detector(model)
    spec = detector.input
    source, judged = load_preprocessed(data, spec), load_preprocessed(val, spec)
    pictures = source.load(range(len(source.files))).astype(np.float32, copy=False)
    truth = load_truth(annotations, judged.files)
    reference = mean_precision(model, judged, truth)
    document: dict[str, Any] = {
        **circumstances("numpy", "onnx", "onnxruntime"),
        "model": model.name,
        "fp32": reference,
        "sets": {},
    }
    typer.echo(f"FP32: {reference:.4f}")
    for name, make in (SETS | EMPTY_SETS).items():
        with tempfile.TemporaryDirectory() as scratch:
            images = write_set(make(pictures), Path(scratch))
            found = dict(measure(detector, images, judged, truth, Path(scratch) / "int8.onnx"))
        document["sets"][name] = found
        typer.echo(f"{name}: {', '.join(f'{key} {value}' for key, value in found.items())}")
        write_json(output, document | {"finished": now()})
    failed = [name for name in SETS if not _kept(document["sets"][name], reference)]
    for name in failed:
        typer.echo(f"{name}: the default loses more than it may")
    sys.exit(bool(failed))


def _kept(found: dict[str, Any], reference: float) -> bool:
    """Whether the default keeps 0.98 of FP32 and is at most 0.005 below the best method."""
    own = found[METHODS[0]]
    return bool(own >= 0.98 * reference and own >= max(found[one] for one in METHODS) - 0.005)


def measure(
    detector: Detector, images: PreprocessedSet, judged: PreprocessedSet, truth: Truth, path: Path
) -> Iterator[tuple[str, object]]:
    """The mAP by method, and what is said of the set."""
    known: dict[tuple[float, ...], float] = {}  # by scales: methods may agree
    calibrations = calibrate_all(detector, images)
    for method, calibration in calibrations.items():
        scales = tuple(calibration.scales.values())
        if scales not in known:
            save(quantize(detector.model, calibration), path)
            known[scales] = round(mean_precision(path, judged, truth), 4)
        yield method, known[scales]
    default = calibrations[METHODS[0]]
    save(quantize(detector.model, default), path)
    agreement = find_agreement(detector.path, path, images)
    yield "empty_images", f"{default.empty_images} of {default.images}"
    yield "matched", f"{agreement.matched} of {agreement.detections}"

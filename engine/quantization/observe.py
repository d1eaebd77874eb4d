"""The one pass over the calibration images: all that calibration learns from them.

Pictures that are dark are looked at a second time as bright as they can be, so that scales from
pictures of the night serve by day, too.

Images stream through ONNX Runtime a batch at a time; of the activations only histograms and largest
values stay, so that what is kept does not grow with the number of images. A further method of
calibration takes what it needs here, not by a pass of its own.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engine.backends.onnxruntime.network import GpuNetwork
from engine.data.preprocessed import MEAN, STD, PreprocessedSet, hash_images, is_flat
from engine.errors import EngineError
from engine.model import Detector
from engine.quantization.histogram import Histogram, magnitude
from engine.quantization.network import heads_model, open_session, run
from engine.quantization.placement import Placement
from graph_surgery.nms_function import DOMAIN

Progress = Callable[[int, int], None]
"""Called with the images done and the images in all."""

_Run = Callable[
    [str, NDArray[np.float32], str], AbstractContextManager[Sequence[NDArray[np.float32]]]
]
"""Runs a network: the name of its input, a batch and its first image; the values are lent."""

_SMALL = 640 * 640
"""Up to so many pixels two batches are looked at side by side; memory holds what both activate."""

_DARK, _BLACK = 0.75, 8 / 255
"""Levels, of 0 to 1: an image without any above the first is dark, one within the second black."""

_BESIDE_A_GPU = 3
"""Batches that are looked at side by side where a GPU runs the network: the CPUs count longer."""


@dataclass(frozen=True)
class Observations:
    """What was seen on the images.

    Attributes
    ----------
    images
        Number of images.
    images_sha256
        Hash of what was read, as `engine.data.preprocessed.images_sha256`.
    empty
        Images that are flat, or in which the detector finds nothing.
    brightest
        Largest magnitude of the images.
    histograms
        Of every quantised activation but the image, and of `Placement.mains`.
    largest
        Largest magnitude of every tensor of `Placement.floats`.
    """

    images: int
    images_sha256: str
    empty: int
    brightest: float
    histograms: Mapping[str, Histogram]
    largest: Mapping[str, float]


def observe(
    detector: Detector,
    placement: Placement,
    images: PreprocessedSet,
    count: int,
    *,
    batch: int,
    device: str,
    progress: Progress | None,
) -> Observations:
    """Run a surgered FP32 detector on the first `count` images, each read once.

    Parameters
    ----------
    device
        ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    EngineError
        When an image cannot be read, a value is NaN or infinite, or ONNX Runtime or the device
        fails.
    """
    small = batch * math.prod(placement.shape[1:]) <= _SMALL
    at_once = _BESIDE_A_GPU if device != "cpu" else 2 if small else 1
    pass_ = _Pass(detector, placement, at_once, device)
    digest, empty = sha256(), 0
    waiting: deque[tuple[int, Future[int]]] = deque()
    with ThreadPoolExecutor(at_once) as pool, pass_.counting:
        for start in range(0, count, batch):
            files = images.files[start : min(start + batch, count)]
            pixels = images.load(range(start, start + len(files))).astype(np.float32, copy=False)
            hash_images(digest, files, pixels)
            waiting.append((start + len(files), pool.submit(pass_.look, files, pixels)))
            while len(waiting) > (at_once if start + len(files) < count else 0):
                done, task = waiting.popleft()
                empty += task.result()
                if progress is not None:
                    progress(done, count)
    return Observations(
        *(count, digest.hexdigest(), empty),
        *(pass_.brightest, pass_.histograms, pass_.largest),
    )


class _Pass:
    """What batches are looked at with, `at_once` of them in threads of their own.

    While one waits for its values to be counted, another runs, so that no CPU waits; ONNX Runtime's
    threads would wait by spinning, at the cost of those that count.
    """

    def __init__(self, detector: Detector, placement: Placement, at_once: int, device: str) -> None:
        network = detector.model
        cpus = len(os.sched_getaffinity(0))
        mains = (main.tensor for main in placement.mains)
        tensors = [name for name in (*placement.tensors, *mains) if name != placement.image]
        self.histograms = {name: Histogram() for name in tensors}
        self.largest = dict.fromkeys(placement.floats, 0.0)
        self.brightest = 0.0
        self.counting = ThreadPoolExecutor(cpus)
        self._names = list(dict.fromkeys([*tensors, *placement.floats, *placement.heads]))
        self._adding = Lock()
        model = heads_model(network, placement, self._names)
        self._run: _Run
        if device == "cpu":
            session = open_session(model, max(1, cpus // at_once))
            self._run = lambda *batch: nullcontext(run(session, self._names, *batch))
        else:
            self._run = GpuNetwork(model, self._names, detector.path, device, at_once).run
        (node,) = (node for node in network.graph.node if node.domain == DOMAIN)
        self._nms = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self._image, self._heads = placement.image, placement.heads

    def look(self, files: Sequence[str], pixels: NDArray[np.float32]) -> int:
        """Count the values of a batch; how many of its images show nothing."""
        empty = self._look(files, pixels)
        bright = brightened(pixels)
        if bright is not None:
            self._look(files, bright)
        return empty

    def _look(self, files: Sequence[str], pixels: NDArray[np.float32]) -> int:
        with self._run(self._image, pixels, files[0]) as found:
            values = {self._image: pixels, **dict(zip(self._names, found, strict=True))}
            tasks = {
                name: self.counting.submit(_count, v, len(files), name in self.histograms)
                for name, v in values.items()
            }
            wait(tasks.values())  # all of them, for the values are only lent
            counted = {}
            for name, task in tasks.items():
                try:
                    counted[name] = task.result()
                except ValueError as error:
                    images = ", ".join(files)
                    raise EngineError(f"tensor {name!r}: {error}, for {images}") from error
            shows = [
                not is_flat(image)
                and _finds([values[head][index] for head in self._heads], self._nms)
                for index, image in enumerate(pixels)
            ]
        with self._adding:
            for name, (parts, top) in counted.items():
                for part, one in zip(
                    parts, shows if len(parts) > 1 else [any(shows)], strict=False
                ):
                    self.histograms[name].add_image(part, shows=one)
                if name == self._image:
                    self.brightest = max(self.brightest, top)
                if name in self.largest:
                    self.largest[name] = max(self.largest[name], top)
        return shows.count(False)


def brightened(images: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Every image multiplied so that its largest level is that of white.

    Parameters
    ----------
    images
        float32 [N, 3, H, W], normalised by `MEAN` and `STD`; those by others stay as they are, and
        so do those that are black.

    Returns
    -------
    float32 [N, 3, H, W] or None
        None where none is darker than `_DARK`.
    """
    if images.shape[1] != len(MEAN):
        return None
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    levels = images * std + mean
    least, largest = levels.min(axis=(1, 2, 3)), levels.max(axis=(1, 2, 3))
    dark = (largest > _BLACK) & (largest < _DARK) & (least > -_BLACK)
    if not dark.any():
        return None
    gain = np.where(dark, 1 / np.where(dark, largest, 1), 1).astype(np.float32)
    bright: NDArray[np.float32] = (levels * gain[:, None, None, None] - mean) / std
    return bright


def _count(values: NDArray[np.float32], images: int, every: bool) -> tuple[list[Histogram], float]:
    """Histogram of every image of a batch, if `every` value is wanted, and the largest magnitude.

    Of a tensor whose first axis is not the batch there is one histogram.

    Raises
    ------
    ValueError
        When a value is NaN or infinite.
    """
    if not every:
        return [], magnitude(values)
    found = []
    for part in values if len(values) == images else [values]:
        found.append(Histogram())
        found[-1].add(part)
    return found, max(one.largest for one in found)


def _finds(heads: Sequence[NDArray[np.float32]], nms: Mapping[str, Any]) -> bool:
    """Tell whether any score of one image is above the threshold of its NMS_OPT_TRT.

    Parameters
    ----------
    heads
        Its loc, then its conf tensors [C * anchors, height, width].
    nms
        Attributes of the node.
    """
    classes = [c for c in range(nms["numClasses"]) if c != nms["backgroundLabelId"]]
    for head in heads[len(heads) // 2 :]:
        logits = head.astype(np.float32, copy=False).reshape(nms["numClasses"], -1)
        if nms["confSigmoid"]:
            scores = 0.5 + 0.5 * np.tanh(0.5 * logits[classes])
        else:
            power = np.exp(logits - logits.max(axis=0))
            scores = power[classes] / power.sum(axis=0)
        if (scores > nms["confidenceThreshold"]).any():
            return True
    return False

"""The one pass over the calibration images: all that calibration learns from them.

Images stream through ONNX Runtime a batch at a time; of the activations only histograms and largest
values stay, so memory does not depend on the number of images. A further method of calibration
takes what it needs here, not by a pass of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engine.histogram import Histogram, magnitude
from engine.network import heads_model, open_session, run
from engine.placement import Placement
from engine.preprocessed import PreprocessedSet, hash_image, is_flat
from engine.protocol import EngineError
from graph_surgery.nms_function import DOMAIN

Progress = Callable[[int, int], None]
"""Called with the images done and the images in all."""


@dataclass(frozen=True)
class Observations:
    """What was seen on the images.

    Attributes
    ----------
    images
        Number of images.
    images_sha256
        Hash of what was read, as `engine.preprocessed.images_sha256`.
    empty
        Images that are flat, or in which the detector finds nothing.
    histograms
        Of every quantised activation but the image.
    largest
        Largest magnitude of every tensor of `Placement.floats`.
    """

    images: int
    images_sha256: str
    empty: int
    histograms: Mapping[str, Histogram]
    largest: Mapping[str, float]


def observe(
    network: onnx.ModelProto,
    placement: Placement,
    images: PreprocessedSet,
    count: int,
    *,
    batch: int,
    progress: Progress | None,
) -> Observations:
    """Run a surgered FP32 detector on the first `count` images, each read once.

    Raises
    ------
    EngineError
        When an image cannot be read, a value is NaN or infinite, or ONNX Runtime fails.
    """
    histograms = {name: Histogram() for name in placement.tensors if name != placement.image}
    names = list(dict.fromkeys([*histograms, *placement.floats]))
    largest = dict.fromkeys(placement.floats, 0.0)
    (node,) = (node for node in network.graph.node if node.domain == DOMAIN)
    nms = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    digest, empty = sha256(), 0
    session = open_session(heads_model(network, placement, names))

    def add(name: str, values: NDArray[np.float32]) -> None:
        if name in histograms:
            histograms[name].add(values)
        top = histograms[name].largest if name in histograms else magnitude(values)
        if name in largest:
            largest[name] = max(largest[name], top)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, count, batch):
            files = images.files[start : min(start + batch, count)]
            pixels = images.load(range(start, start + len(files))).astype(np.float32, copy=False)
            found = run(session, names, placement.image, pixels, files[0])
            values = {placement.image: pixels, **dict(zip(names, found, strict=True))}
            tasks = {name: pool.submit(add, name, value) for name, value in values.items()}
            for name, task in tasks.items():
                try:
                    task.result()
                except ValueError as error:
                    where = f"for {', '.join(files)}"
                    raise EngineError(f"tensor {name!r}: {error}, {where}") from error
            for index, name in enumerate(files):
                hash_image(digest, name, pixels[index])
                heads = [values[head][index] for head in placement.heads]
                empty += is_flat(pixels[index]) or not _finds(heads, nms)
            del found, values, tasks  # or they would stay until the next batch has run
            if progress is not None:
                progress(start + len(files), count)
    return Observations(count, digest.hexdigest(), empty, histograms, largest)


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
        logits = head.reshape(nms["numClasses"], -1)
        if nms["confSigmoid"]:
            scores = 0.5 + 0.5 * np.tanh(0.5 * logits[classes])
        else:
            power = np.exp(logits - logits.max(axis=0))
            scores = power[classes] / power.sum(axis=0)
        if (scores > nms["confidenceThreshold"]).any():
            return True
    return False

"""Which layers quantisation hurts: signal-to-noise ratio of the heads, one layer at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from engine.data.preprocessed import PreprocessedSet
from engine.model import Detector
from engine.quantization.cache import Calibration
from engine.quantization.calibration import check_images
from engine.quantization.network import heads_model, open_session, run
from engine.quantization.observe import Progress
from engine.quantization.placement import Placement, find_placement
from engine.quantization.qdq import insert_qdq
from graph_surgery.graph import export_graph, import_graph

Heads = list[NDArray[np.float32]]
"""One array per head, loc then conf."""


@dataclass(frozen=True)
class Noise:
    """What quantisation leaves of the heads, against FP32, in dB; infinite where nothing changed.

    Attributes
    ----------
    loc_db, conf_db
        Power of all loc (conf) tensors over the power of their difference.
    """

    loc_db: float
    conf_db: float

    @property
    def worst_db(self) -> float:
        """The lower of the two."""
        return min(self.loc_db, self.conf_db)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes
    ----------
    layer
        Its name, as `engine quantize --keep-float` takes it.
    only_quantized
        The heads when this layer alone is quantised.
    only_float
        The heads when this layer alone is left float.
    gain_db
        What leaving it float gives, the worse of loc and conf: ``only_float`` minus all quantised.
    """

    layer: str
    only_quantized: Noise
    only_float: Noise
    gain_db: float


@dataclass(frozen=True)
class Sensitivity:
    """All layers.

    Attributes
    ----------
    images
        Number of images.
    all_quantized
        The heads when every layer is quantised.
    layers
        The most sensitive first: the lowest ``only_quantized.worst_db``.
    """

    images: int
    all_quantized: Noise
    layers: tuple[LayerSensitivity, ...]


def sensitivity(
    detector: Detector,
    calibration: Calibration,
    images: PreprocessedSet,
    *,
    limit: int | None = 8,
    batch: int = 1,
    progress: Progress | None = None,
) -> Sensitivity:
    """Quantise every layer alone, and all layers but it, and compare the heads with FP32.

    An addition or a pooling is quantised together with the convolution whose kernel feeds it, as in
    `engine.quantization.quantize`.

    Parameters
    ----------
    detector
        Surgered FP32 detector.
    calibration
        Its scales.
    images
        float32 images of its input.
    limit
        Take the first so many images; None: all.
    batch
        Images that run together.
    progress
        Told after every pass over the images, of which there are two for each layer, and one.

    Raises
    ------
    EngineError
        For an unusable model, another model's calibration, or unusable images.
    """
    network = detector.model
    placement = find_placement(network)
    calibration.check(network, placement)
    count = check_images(placement, images, limit, batch)
    every = frozenset(range(len(placement.layers)))
    passes = 2 * len(every) + 1
    reference = _heads(heads_model(network, placement), placement, images, count, batch)

    def noise(layers: frozenset[int], done: int) -> Noise:
        graph = import_graph(network)
        insert_qdq(graph, placement, calibration.scales, layers)
        quantized = export_graph(graph, network)
        heads = _heads(heads_model(quantized, placement), placement, images, count, batch)
        if progress is not None:
            progress(done, passes)
        return compare(reference, heads)

    total = noise(every, 1)
    rows = []
    for index, layer in enumerate(placement.layers):
        alone = noise(frozenset([index]), 2 * index + 2)
        without = noise(every - {index}, 2 * index + 3)
        gain = without.worst_db - total.worst_db
        rows.append(LayerSensitivity(layer.name, alone, without, gain))
    rows.sort(key=lambda row: row.only_quantized.worst_db)
    return Sensitivity(count, total, tuple(rows))


def compare(reference: Heads, heads: Heads) -> Noise:
    """Signal-to-noise ratio of heads against a reference, of all images together.

    The first half of the heads are loc, the others conf, as NMS_OPT_TRT takes them.
    """
    half = len(reference) // 2
    return Noise(_snr_db(reference[:half], heads[:half]), _snr_db(reference[half:], heads[half:]))


def _snr_db(reference: Heads, heads: Heads) -> float:
    signal = sum(float(np.square(a, dtype=np.float64).sum()) for a in reference)
    pairs = zip(reference, heads, strict=True)
    noise = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _heads(
    network: onnx.ModelProto,
    placement: Placement,
    images: PreprocessedSet,
    count: int,
    batch: int,
) -> Heads:
    """Every head for all images, float32 [count, ...]."""
    session = open_session(network)
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    parts = [
        run(session, placement.heads, placement.image, images.load(one), images.files[one[0]])
        for one in batches
    ]
    return [np.concatenate(head) for head in zip(*parts, strict=True)]

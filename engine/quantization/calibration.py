"""Calibration: one scale for every quantised activation, from one pass over images.

The image's scale follows from what pixels are; those of the other tensors from what
`engine.quantization.observe` saw and `engine.quantization.thresholds` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engine.data.preprocessed import (
    PIXEL_RANGE,
    PreprocessedSet,
    images_sha256,
    preprocessing_sha256,
)
from engine.errors import EngineError
from engine.model import Detector
from engine.quantization.cache import Calibration, Statistics
from engine.quantization.network import network_sha256
from engine.quantization.observe import Observations, Progress, observe
from engine.quantization.placement import Placement, find_placement
from engine.quantization.thresholds import METHODS, STEPS, clipped_share, snr_db, threshold
from graph_surgery.protobuf import types


def calibrate(
    detector: Detector,
    images: PreprocessedSet,
    *,
    method: str = METHODS[0],
    limit: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Calibration:
    """Find the scale of every activation that `engine.quantization.placement` wants quantised.

    Parameters
    ----------
    detector
        Surgered FP32 detector.
    images
        float32 images of its input.
    method
        One of `engine.quantization.thresholds.METHODS`.
    limit
        Take the first so many images; None: all.
    batch
        Images that run together. The result does not depend on it but for rounding in the network;
        memory grows with it.
    device
        What runs the network: ``cpu``, ``cuda`` or ``cuda:N``. A scale differs by no more than a
        bin of its histogram.
    progress
        Told after every batch.

    Raises
    ------
    EngineError
        For an unusable model, images that are not its input, no images, a value that is NaN or
        infinite, or when ONNX Runtime or the device fails.
    """
    return calibrate_all(
        detector,
        images,
        methods=(method,),
        limit=limit,
        batch=batch,
        device=device,
        progress=progress,
    )[method]


def calibrate_all(
    detector: Detector,
    images: PreprocessedSet,
    *,
    methods: tuple[str, ...] = METHODS,
    limit: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Calibration]:
    """Calibrate by several methods in one pass over the images; see `calibrate`."""
    import onnxruntime

    for method in methods:
        if method not in METHODS:
            raise EngineError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    network = detector.model
    placement = find_placement(network)
    _check_float32(network, placement)
    count = check_images(placement, images, limit, batch)
    seen = observe(
        detector, placement, images, count, batch=batch, device=device, progress=progress
    )
    common: dict[str, Any] = {
        "images": count,
        "images_sha256": seen.images_sha256,
        "model_sha256": network_sha256(network, placement),
        "preprocessing_sha256": preprocessing_sha256(placement.shape),
        "versions": {
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "empty_images": seen.empty,
        "model": detector.path.name,
        "largest": seen.largest,
    }
    scales = {
        name: {known: threshold(histogram, known) / STEPS for known in METHODS}
        for name, histogram in seen.histograms.items()
        if histogram.largest
    }
    return {method: _calibration(placement, seen, scales, method, common) for method in methods}


def _calibration(
    placement: Placement,
    seen: Observations,
    scales: Mapping[str, Mapping[str, float]],
    method: str,
    common: Mapping[str, Any],
) -> Calibration:
    """Calibrate by one method, from the scales of every tensor by all methods."""
    # a tensor that is 0 everywhere is 0 at any scale
    taken = {name: scales[name][method] if name in scales else 1.0 for name in placement.tensors}
    if placement.image in taken:
        # beyond what pixels can be: images of another normalisation, none of which is clipped
        other = seen.brightest > 1.001 * PIXEL_RANGE
        taken[placement.image] = (seen.brightest if other else PIXEL_RANGE) / STEPS
    sums = {
        main.tensor: scales[main.tensor][method] if main.tensor in scales else 1.0
        for main in placement.mains
    }
    statistics = {
        name: Statistics(
            known,
            clipped_share(seen.histograms[name], known[method] * STEPS),
            snr_db(seen.histograms[name], known[method] * STEPS),
        )
        for name, known in scales.items()
        if name in taken
    }
    return Calibration(taken, method, **common, statistics=statistics, sums=sums)


def is_current(
    path: Path, detector: Detector, images: PreprocessedSet, *, method: str, limit: int | None
) -> bool | None:
    """Tell whether a cache holds what `calibrate` would find, so that it need not run again.

    Returns
    -------
    bool or None
        None when it is out of date: of this model file as it was before, or of an earlier release.

    Raises
    ------
    EngineError
        When model or images are unusable. An unusable cache is not current.
    """
    network = detector.model
    placement = find_placement(network)
    count = check_images(placement, images, limit, placement.batch or 1)
    try:
        cache = Calibration.load(path)
    except EngineError:
        return False
    try:
        cache.check(network, placement)
    except EngineError:
        return None if cache.model == detector.path.name else False
    if {main.tensor for main in placement.mains} - cache.sums.keys():
        return None  # of an earlier release
    return (cache.method, cache.images) == (method, count) and (
        cache.images_sha256 == images_sha256(images, count)
    )


def _check_float32(network: onnx.ModelProto, placement: Placement) -> None:
    """Refuse a network of another type before its images are run: it cannot be quantised."""
    kinds = {tensor.name: tensor.data_type for tensor in network.graph.initializer}
    if any(layer.weight not in kinds for layer in placement.layers):  # a node makes it
        kinds |= {name: known.type.tensor_type.elem_type for name, known in types(network).items()}
    for layer in placement.layers:
        kind = kinds.get(layer.weight, onnx.TensorProto.FLOAT)
        if kind != onnx.TensorProto.FLOAT:
            name = onnx.TensorProto.DataType.Name(kind)
            raise EngineError(
                f"the weights of layer {layer.name!r} are {name}; quantisation starts from the "
                "float32 network (its result may have float16 between: --float-type fp16)"
            )


def check_images(
    placement: Placement, images: PreprocessedSet, limit: int | None, batch: int
) -> int:
    """Make sure that a model can run on the first `limit` images in such batches.

    Returns
    -------
    int
        Number of images.

    Raises
    ------
    EngineError
        When there are not as many, they are not the model's input, or the batch does not fit.
    """
    count = len(images.files) if limit is None else limit
    if not images.files or count < 1:
        raise EngineError(f"{images.directory}: no images to calibrate with")
    if count > len(images.files):
        raise EngineError(f"{count} images wanted, {images.directory} holds {len(images.files)}")
    if batch < 1:
        raise EngineError(f"a batch of {batch} images; at least 1 is needed")
    if placement.batch is not None and (batch != placement.batch or count % batch):
        raise EngineError(
            f"the model's batch is fixed at {placement.batch}: calibrate in such batches, with a "
            f"multiple of {placement.batch} images"
        )
    if (images.spec.dtype, images.spec.shape) != ("float32", placement.shape):
        raise EngineError(
            f"{images.directory} holds {images.spec.dtype} images {list(images.spec.shape)}, "
            f"calibration of this model takes float32 {list(placement.shape)}"
        )
    return count

"""Calibration: one scale for every quantised activation, from images, in one pass.

Images stream through ONNX Runtime one batch at a time; of the activations only histograms stay, so
memory does not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engine.calibration_cache import STEPS, Calibration
from engine.histogram import METHODS, Histogram, threshold
from engine.network import heads_model, load_detector, network_sha256, open_session, run
from engine.placement import Placement, find_placement
from engine.preprocessed import PreprocessedSet, images_sha256, preprocessing_sha256
from engine.protocol import EngineError

Progress = Callable[[int, int], None]
"""Called with the images done and the images in all."""


def calibrate(
    model: Path,
    images: PreprocessedSet,
    *,
    method: str = METHODS[0],
    limit: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Find the scale of every activation that `engine.placement` wants quantised.

    Parameters
    ----------
    model
        Surgered FP32 ONNX file.
    images
        float32 images of its input.
    method
        One of `engine.histogram.METHODS`.
    limit
        Take the first so many images; None: all.
    batch
        Images that run together. The result does not depend on it but for rounding in the network;
        memory grows with it.
    progress
        Told after every batch.

    Raises
    ------
    EngineError
        For an unusable model, images that are not its input, no images, a value that is NaN or
        infinite, or when ONNX Runtime fails.
    """
    return calibrate_all(
        model, images, methods=(method,), limit=limit, batch=batch, progress=progress
    )[method]


def calibrate_all(
    model: Path,
    images: PreprocessedSet,
    *,
    methods: tuple[str, ...] = METHODS,
    limit: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> dict[str, Calibration]:
    """Calibrate by several methods in one pass over the images; see `calibrate`."""
    import onnxruntime

    for method in methods:
        if method not in METHODS:
            raise EngineError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    network = load_detector(model)
    placement = find_placement(network)
    count = check_images(placement, images, limit, batch)
    histograms = _collect(network, placement, images, count, batch=batch, progress=progress)
    common: dict[str, Any] = {
        "images": count,
        "images_sha256": images_sha256(images, count),
        "model_sha256": network_sha256(network, placement),
        "preprocessing_sha256": preprocessing_sha256(placement.shape),
        "versions": {
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
    return {
        method: Calibration(
            # a tensor that is 0 everywhere is 0 at any scale
            {name: threshold(h, method) / STEPS or 1.0 for name, h in histograms.items()},
            method,
            **common,
        )
        for method in methods
    }


def is_current(
    path: Path, model: Path, images: PreprocessedSet, *, method: str, limit: int | None
) -> bool:
    """Tell whether a cache holds what `calibrate` would find, so that it need not run again.

    Raises
    ------
    EngineError
        When model or images are unusable. An unusable cache is not current.
    """
    network = load_detector(model)
    placement = find_placement(network)
    count = check_images(placement, images, limit, placement.batch or 1)
    try:
        cache = Calibration.load(path)
        cache.check(network, placement)
    except EngineError:
        return False
    return (cache.method, cache.images) == (method, count) and (
        cache.images_sha256 == images_sha256(images, count)
    )


def _collect(
    network: onnx.ModelProto,
    placement: Placement,
    images: PreprocessedSet,
    count: int,
    *,
    batch: int,
    progress: Progress | None,
) -> dict[str, Histogram]:
    """Histograms of every quantised activation over the first `count` images."""
    names = placement.tensors
    histograms = {name: Histogram() for name in names}
    session = open_session(heads_model(network, placement, names))
    for start in range(0, count, batch):
        indices = range(start, min(start + batch, count))
        values = run(session, names, placement.image, images, indices)
        for name, value in zip(names, values, strict=True):
            try:
                histograms[name].add(value)
            except ValueError as error:
                where = ", ".join(images.files[index] for index in indices)
                raise EngineError(f"tensor {name!r}: {error}, for {where}") from error
        del value, values  # or they would stay until the next batch has run
        if progress is not None:
            progress(indices.stop, count)
    return histograms


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

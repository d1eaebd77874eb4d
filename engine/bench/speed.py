"""What the benches of engines share: batch sizes, images, the peaks of GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.preprocessed import load_preprocessed
from engine.errors import EngineError
from engine.protocol import Engine


@dataclass(frozen=True)
class Peak:
    """What a GPU can do: dense INT8 TOPS and memory bandwidth in TB/s (NVIDIA's data sheets)."""

    tops: float
    terabytes: float


PEAKS: Mapping[str, Peak] = {
    "NVIDIA H100 80GB HBM3": Peak(1979, 3.35),
    "NVIDIA H100 PCIe": Peak(1513, 2.0),
    "NVIDIA H200": Peak(1979, 4.8),
    "NVIDIA A100-SXM4-80GB": Peak(624, 2.039),
    "NVIDIA A100-SXM4-40GB": Peak(624, 1.555),
    "NVIDIA A100 80GB PCIe": Peak(624, 1.935),
    "NVIDIA L4": Peak(242.5, 0.3),
}
"""By the driver's name of the GPU. INT8 without sparsity."""

_POOL = 64
"""Images in page-locked memory; batches go round them."""


def parse_batches(text: str) -> list[int]:
    """Read batch sizes, as ``1,8,64``; in order.

    Raises
    ------
    EngineError
        When it is no such list.
    """
    try:
        sizes = sorted({int(size) for size in text.split(",")})
    except ValueError as error:
        raise EngineError(f"--batches {text}: numbers with commas between expected") from error
    if sizes[0] < 1:
        raise EngineError(f"--batches {text}: a batch has one image at least")
    return sizes


def image_pool(engine: Engine, data: Path | None) -> NDArray[np.int8]:
    """Page-locked images, int8 [64, 3, H, W]: the first of a preprocessed set, or noise."""
    images = engine.host_array((_POOL, *engine.input_spec.shape), np.int8)
    if data is None:
        images[:] = np.random.default_rng(0).integers(-60, 61, images.shape, np.int8)
    else:
        source = load_preprocessed(data, engine.input_spec)
        source.read_into(images, [index % len(source.files) for index in range(_POOL)])
    return images

"""RetinaNet's anchors, as torchvision and the MLCommons reference make them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.retinanet.config import RetinaNetConfig

SIZES = (32, 64, 128, 256, 512)
"""Side of the smallest anchor of each level, in pixels."""

RATIOS = (0.5, 1.0, 2.0)
"""Height over width."""


def pixel_anchors(config: RetinaNetConfig) -> list[NDArray[np.float32]]:
    """Anchors of each level, float32 [9, h, w, 4]: xmin, ymin, xmax, ymax in pixels.

    Anchor 3 r + s of a cell has ratio r and size s. Its corners are rounded to whole pixels, half
    to even. The first cell is centred on the image's corner, and cells are as many whole pixels
    apart as fit into the image.
    """
    levels = []
    ratio = np.sqrt(np.array(RATIOS, np.float32))
    for size, (rows, columns) in zip(SIZES, config.feature_shapes, strict=True):
        sizes = np.array([int(size * 2 ** (third / 3)) for third in range(3)], np.float32)
        width, height = (1 / ratio)[:, None] * sizes, ratio[:, None] * sizes
        half = np.stack([width, height], axis=-1).reshape(-1, 1, 1, 2) / 2
        x = np.arange(columns) * (config.image_width // columns)
        y = np.arange(rows) * (config.image_height // rows)
        centre = np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32)
        levels.append(np.concatenate([centre + np.round(-half), centre + np.round(half)], axis=-1))
    return levels


def anchors(config: RetinaNetConfig) -> NDArray[np.float64]:
    """Anchors of all levels, float64 [P, 4]: xmin, ymin, xmax, ymax in fractions of the image.

    Order: level, anchor, row, column.
    """
    pixels = np.concatenate([level.reshape(-1, 4) for level in pixel_anchors(config)])
    return pixels / np.array([config.image_width, config.image_height] * 2, np.float64)

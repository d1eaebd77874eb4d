"""Default boxes (priors) of SSD-ResNet34, after MLCommons ssd_r34.py."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from export.ssd_resnet34.config import ASPECT_RATIOS, SSDConfig

SCALES_AT_300 = (21, 45, 99, 153, 207, 261, 315)
"""Default-box scales in pixels of a 300x300 image; scaled to the image size and truncated."""

VARIANCES = (0.1, 0.1, 0.2, 0.2)
"""Factors on the regressed (x, y, w, h) deltas; SSD, Liu et al. 2016."""


def default_boxes(config: SSDConfig) -> NDArray[np.float32]:
    """Make the default boxes.

    Returns
    -------
    float32 [P, 4]: (cx, cy, w, h), normalised to the image and clamped to [0, 1] as the reference
    clamps (before any conversion to corners). Order: level, shape, row, column, which is the
    order of the head tensors flattened over (shape, row, column).
    """
    size = config.image_size
    scales = [int(s * size / 300) / size for s in SCALES_AT_300]
    levels = []
    for level, (grid, ratios) in enumerate(zip(config.grid_sizes, ASPECT_RATIOS, strict=True)):
        small, large = scales[level], scales[level + 1]
        between = math.sqrt(small * large)
        shapes = [(small, small), (between, between)]
        for ratio in ratios:
            w, h = small * math.sqrt(ratio), small / math.sqrt(ratio)
            shapes += [(w, h), (h, w)]
        # The reference divides by image_size // step, not by the grid: the same at 1200.
        centres = (np.arange(grid) + 0.5) / (size // (size // grid))
        boxes = np.empty((len(shapes), grid, grid, 4))
        boxes[..., 0] = centres[None, None, :]
        boxes[..., 1] = centres[None, :, None]
        boxes[..., 2:] = np.array(shapes)[:, None, None, :]
        levels.append(boxes.reshape(-1, 4))
    return np.concatenate(levels).clip(0.0, 1.0).astype(np.float32)

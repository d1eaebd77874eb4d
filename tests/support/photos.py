"""Pictures, and what preprocessing must make of them, by plain OpenCV and NumPy."""

from __future__ import annotations

import cv2
import numpy as np


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth structure and noise: a picture on which interpolation and rounding matter."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def reference(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The MLPerf reference's steps in their order (facts: resize in float32)."""
    rgb = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2RGB)
    rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LINEAR)
    rgb /= 255.0
    rgb -= np.array([0.485, 0.456, 0.406], np.float32)
    rgb /= np.array([0.229, 0.224, 0.225], np.float32)
    return rgb.transpose(2, 0, 1)

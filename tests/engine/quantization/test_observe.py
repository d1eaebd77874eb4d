"""Dark images are looked at as bright as they can be, and no others."""

from __future__ import annotations

import numpy as np

from engine.data.preprocessed import MEAN, STD
from engine.quantization.observe import brightened


def normalised(levels):
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    return np.float32((levels - mean) / std)


def test_a_dark_image_reaches_white_and_keeps_its_ratios() -> None:
    day = np.random.default_rng(0).uniform(0, 1, (2, 3, 6, 8))
    day[:, 0, 0, 0] = 1
    images = normalised(np.stack([day[0] / 8, day[1]]))
    np.testing.assert_allclose(brightened(images), normalised(day), atol=1e-5)


def test_day_black_and_another_normalisation_stay() -> None:
    day = np.full((3, 4, 4), 0.8)
    black = np.full((3, 4, 4), 0.02)
    assert brightened(normalised(np.stack([day, black]))) is None
    signed = np.random.default_rng(1).uniform(-1, 0.5, (3, 4, 4))  # no level is below 0
    assert brightened(normalised(signed[None])) is None
    assert brightened(np.zeros((1, 1, 4, 4), np.float32)) is None

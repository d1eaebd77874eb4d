"""Shaded shapes that belong to no category, so that not every object is one to detect."""

import cv2
import numpy as np
import numpy.typing as npt

_Points = npt.NDArray[np.float64]


def _outline(rng: np.random.Generator) -> _Points:
    """Draw a closed outline of radius about 1: blob, polygon, star, heart or crescent."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    kind = rng.integers(5)
    if kind == 0:
        radius = 1 + sum(
            rng.uniform(-0.2, 0.2) * np.cos(k * turn + rng.uniform(0, 6)) for k in (2, 3, 5)
        )
        return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)
    if kind == 1:
        corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        return np.stack([np.cos(corners), np.sin(corners)], axis=1)
    if kind == 2:
        spikes = int(rng.integers(4, 9))
        corner = np.arange(2 * spikes) * np.pi / spikes
        radius = np.where(np.arange(2 * spikes) % 2, rng.uniform(0.35, 0.7), 1)
        return np.stack([radius * np.cos(corner), radius * np.sin(corner)], axis=1)
    if kind == 3:
        x = np.sin(turn) ** 3
        y = 0.82 * np.cos(turn) - 0.31 * np.cos(2 * turn) - 0.12 * np.cos(3 * turn)
        return np.stack([x, -y], axis=1)
    inner = 0.75 * np.stack([np.cos(turn[::-1]), np.sin(turn[::-1])], axis=1) + [0.35, 0]
    return np.concatenate([np.stack([np.cos(turn), np.sin(turn)], axis=1), inner])


def draw_distractors(rng: np.random.Generator, image: npt.NDArray[np.uint8], count: int) -> None:
    """Paint ``count`` shapes and strokes on a BGR uint8 picture, in place."""
    height, width = image.shape[:2]
    for _ in range(count):
        centre = rng.uniform(0, [width, height])
        colour = rng.uniform(0, 255, 3)
        size = float(np.exp(rng.uniform(np.log(8), np.log(70))))
        if rng.random() < 0.25:
            points = centre + np.cumsum(
                rng.normal(0, size / 2, (int(rng.integers(2, 6)), 2)), axis=0
            )
            cv2.polylines(
                image, [points.astype(np.int32)], False, colour.tolist(),
                int(rng.integers(1, 9)), cv2.LINE_AA,
            )  # fmt: skip
            continue
        angle = rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        outline = _outline(rng) * [1, rng.uniform(0.5, 1)] @ turn.T
        # Two or three nested, brighter copies: the shading of a solid thing.
        for step in range(int(rng.integers(1, 4))):
            points = centre + outline * size * (1 - 0.25 * step) - size * 0.06 * step
            shade = np.clip(colour * (1 + 0.25 * step) + 12 * step, 0, 255)
            cv2.fillPoly(
                image, [(points * 16).astype(np.int32)], shade.tolist(), cv2.LINE_AA, shift=4
            )

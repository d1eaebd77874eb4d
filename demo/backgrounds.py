"""Procedural backgrounds for the demo scenes: textures, surfaces and out-of-focus landscapes."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

# float32 [SIDE, SIDE] or [SIDE, SIDE, 3]; OpenCV's type hints know no dtype.
_Plane = npt.NDArray[Any]

SIDE = 640
"""Side of a background in pixels; scenes cut their own piece out of it."""


def _colour(rng: np.random.Generator, low: float = 20, high: float = 240) -> _Plane:
    """Draw a BGR colour, saturated or greyish."""
    grey = rng.uniform(low, high)
    spread = rng.choice([12.0, 45.0, 110.0])
    return np.clip(grey + rng.uniform(-spread, spread, 3), low, high).astype(np.float32)


def _unit(plane: _Plane) -> _Plane:
    """Stretch to [0, 1]."""
    low, high = float(plane.min()), float(plane.max())
    stretched: _Plane = (plane - low) / (high - low)
    return stretched


def _noise(
    rng: np.random.Generator, cells: float, octaves: int = 5, stretch: float = 1.0
) -> _Plane:
    """Fractal value noise in [0, 1]; ``cells`` per side, ``stretch`` times as many vertically."""
    total = np.zeros((SIDE, SIDE), np.float32)
    weight = 1.0
    for _ in range(octaves):
        rows = int(np.clip(cells * stretch, 2, SIDE))
        columns = int(np.clip(cells, 2, SIDE))
        grid = rng.random((rows, columns), dtype=np.float32)
        total += weight * cv2.resize(grid, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        cells, weight = cells * 2, weight * 0.55
    return _unit(total)


def _palette(rng: np.random.Generator, plane: _Plane, colours: int = 0) -> _Plane:
    """Map a plane in [0, 1] to a smooth ramp through random colours, float32 BGR."""
    count = colours or int(rng.integers(2, 5))
    ramp = np.array([_colour(rng) for _ in range(count)], np.float32)[None]
    table = cv2.resize(ramp, (256, 1), interpolation=cv2.INTER_LINEAR)[0]
    painted: _Plane = table[(plane * 255).astype(np.uint8)]
    return painted


def _grid(rng: np.random.Generator) -> tuple[_Plane, _Plane]:
    """Pixel coordinates turned by a random angle, mostly upright."""
    angle = rng.choice([0.0, float(rng.uniform(0, np.pi))])
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def gradient(rng: np.random.Generator) -> _Plane:
    """Linear or radial colour ramp."""
    if rng.random() < 0.5:
        plane, _ = _grid(rng)
    else:
        centre = rng.uniform(0, SIDE, 2)
        y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
        plane = np.hypot(x - centre[0], y - centre[1])
    return _palette(rng, _unit(plane))


def clouds(rng: np.random.Generator) -> _Plane:
    """Fractal noise: marble, stains, clouds."""
    plane = _noise(rng, rng.uniform(2, 12), octaves=int(rng.integers(2, 6)))
    return _palette(rng, plane)


def stripes(rng: np.random.Generator) -> _Plane:
    """Stripes, checks or dots in two colours, like cloth or wallpaper."""
    u, v = _grid(rng)
    period = rng.uniform(24, 140)
    duty = rng.uniform(0.3, 0.7)
    a, b = (u / period) % 1, (v / (period * rng.uniform(0.6, 1.6))) % 1
    kind = rng.integers(4)
    if kind == 0:
        plane = (a < duty).astype(np.float32)
    elif kind == 1:
        plane = ((a < 0.5) ^ (b < 0.5)).astype(np.float32)
    elif kind == 2:
        plane = ((a - 0.5) ** 2 + (b - 0.5) ** 2 < (duty * 0.5) ** 2).astype(np.float32)
    else:
        plane = 0.5 * ((a < duty).astype(np.float32) + (b < duty))
    plane = np.asarray(cv2.GaussianBlur(plane, (0, 0), rng.uniform(0.6, 2.5)))
    first, second = _colour(rng), _colour(rng)
    contrast = np.float32(rng.uniform(0.3, 1))
    cloth: _Plane = first + (second - first) * plane[..., None] * contrast
    return cloth


def bricks(rng: np.random.Generator) -> _Plane:
    """Wall of bricks or tiles with joints."""
    height = rng.uniform(26, 90)
    width = height * rng.uniform(1, 3)
    joint = rng.uniform(2, 6)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    row = np.floor(y / height)
    x = x + (row % 2) * width * rng.choice([0.0, 0.5])
    column = np.floor(x / width)
    shades = rng.uniform(0.8, 1.15, 4096).astype(np.float32)
    shade = shades[((row * 131 + column * 17) % 4096).astype(np.int64)]
    shade *= 0.85 + 0.3 * _noise(rng, 40, 3)
    wall: _Plane = _colour(rng, 40, 220) * shade[..., None]
    joints = ((y % height < joint) | (x % width < joint)).astype(np.float32)
    joints = cv2.GaussianBlur(joints, (0, 0), 0.9)[..., None]
    wall += (_colour(rng, 60, 230) - wall) * joints
    return wall


def wood(rng: np.random.Generator) -> _Plane:
    """Planks with grain."""
    grain = _noise(rng, 3, 5, stretch=rng.uniform(12, 30))
    plane = 0.5 + 0.5 * np.sin(grain * rng.uniform(20, 60))
    plane = 0.6 * plane.astype(np.float32) + 0.4 * _noise(rng, 6, 4, stretch=20)
    dark = np.array([rng.uniform(15, 60), rng.uniform(45, 95), rng.uniform(70, 130)], np.float32)
    light = np.clip(dark * rng.uniform(1.4, 2.0), 0, 235).astype(np.float32)
    image: _Plane = dark + (light - dark) * plane[..., None]
    plank = rng.uniform(60, 200)
    y = np.arange(SIDE, dtype=np.float32)
    image *= np.where(y % plank < 3, 0.55, 1).astype(np.float32)[:, None, None]
    return image if rng.random() < 0.6 else np.ascontiguousarray(image.transpose(1, 0, 2))


def grass(rng: np.random.Generator) -> _Plane:
    """Lawn, straw or carpet: thousands of short strokes over noise."""
    base = _colour(rng, 40, 170)
    if rng.random() < 0.7:
        base = np.array([rng.uniform(20, 60), rng.uniform(90, 160), rng.uniform(40, 110)])
    image: _Plane = (base * (0.7 + 0.6 * _noise(rng, 8, 4)[..., None])).astype(np.float32)
    count = int(rng.integers(1200, 3000))
    start = rng.integers(0, SIDE, (count, 2))
    stop = start + np.stack([rng.integers(-7, 8, count), -rng.integers(8, 26, count)], axis=1)
    shade = rng.uniform(0.6, 1.5, count)
    for a, b, factor in zip(start.tolist(), stop.tolist(), shade.tolist(), strict=True):
        cv2.line(image, a, b, (base * factor).tolist(), 1, cv2.LINE_AA)
    return image


def horizon(rng: np.random.Generator) -> _Plane:
    """Sky with clouds, hills, and a plain in front, out of focus."""
    level = int(rng.uniform(0.3, 0.7) * SIDE)
    zenith = np.array([rng.uniform(150, 250), rng.uniform(110, 190), rng.uniform(50, 140)])
    haze = np.array([rng.uniform(190, 245), rng.uniform(180, 240), rng.uniform(170, 250)])
    ramp = np.clip(np.arange(SIDE) / level, 0, 1)[:, None, None]
    image = (zenith + (haze - zenith) * ramp).repeat(SIDE, axis=1).astype(np.float32)
    cover = np.clip(_noise(rng, 3, 5, stretch=2) * 3 - rng.uniform(1.2, 2.2), 0, 1)[..., None]
    image += (245 - image) * cover * np.float32(0.85)
    for distance in (0.35, 0.7):
        crest = cv2.resize(rng.random((1, 9), dtype=np.float32), (SIDE, 1), None, 0, 0,
                           cv2.INTER_CUBIC)[0]  # fmt: skip
        edge = (level - (1 - distance) * SIDE * 0.3 * crest).astype(np.int32)
        points = np.stack([np.arange(SIDE), edge], axis=1)
        outline = np.concatenate([points, [[SIDE, SIDE], [0, SIDE]]]).astype(np.int32)
        hill = haze + (_colour(rng, 40, 140) - haze) * distance
        cv2.fillPoly(image, [outline], hill.tolist(), cv2.LINE_AA)
    texture = _noise(rng, rng.uniform(5, 30), 5, stretch=3)
    ground = _colour(rng, 50, 170) * (0.65 + 0.7 * texture[..., None])
    image[level:] = ground[level:]
    blurred: _Plane = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.8, 4))
    return blurred


def bokeh(rng: np.random.Generator) -> _Plane:
    """Large blurred blobs, as a photograph's background far out of focus."""
    image = gradient(rng)
    for _ in range(int(rng.integers(12, 50))):
        axes = tuple(int(v) for v in rng.integers(15, 160, 2))
        centre = tuple(int(v) for v in rng.integers(0, SIDE, 2))
        cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, _colour(rng).tolist(), -1)
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), rng.uniform(2, 8))
    return cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def room(rng: np.random.Generator) -> _Plane:
    """Wall above a floor of boards or tiles seen in perspective, with a skirting board."""
    makers: tuple[Callable[[np.random.Generator], _Plane], ...] = (
        stripes,
        bricks,
        clouds,
        gradient,
    )
    image = 0.5 * makers[rng.integers(len(makers))](rng) + 0.5 * _colour(rng, 90, 240)
    level = int(rng.uniform(0.45, 0.75) * SIDE)
    floor = (wood, bricks, stripes)[rng.integers(3)](rng)
    spread = SIDE * rng.uniform(0.3, 0.9)
    source = np.array([[0, 0], [SIDE, 0], [SIDE, SIDE], [0, SIDE]], np.float32)
    target = np.array(
        [[0, level], [SIDE, level], [SIDE + spread, SIDE], [-spread, SIDE]], np.float32
    )
    matrix = cv2.getPerspectiveTransform(source, target)
    image[level:] = cv2.warpPerspective(floor, matrix, (SIDE, SIDE))[level:]
    image[level - 12 : level] = _colour(rng, 120, 245)
    shade = np.linspace(1.1, 0.85, SIDE, dtype=np.float32)[:, None, None]
    return cv2.GaussianBlur(image * shade, (0, 0), rng.uniform(0.5, 2))


MAKERS: tuple[Callable[[np.random.Generator], _Plane], ...] = (
    gradient,
    clouds,
    stripes,
    bricks,
    wood,
    grass,
    horizon,
    bokeh,
    room,
)


def make_background(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Paint one background of a random kind.

    Returns
    -------
    BGR uint8 [SIDE, SIDE, 3].
    """
    image = MAKERS[rng.integers(len(MAKERS))](rng)
    return np.clip(image, 0, 255).astype(np.uint8)

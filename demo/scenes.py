"""Annotated scenes: category pictures composed on procedural backgrounds, numpy and OpenCV only."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from demo.backgrounds import SIDE, make_background
from demo.categories import CATEGORIES
from demo.distractors import draw_distractors
from demo.glyphs import Atlas

Image = npt.NDArray[Any]  # uint8 [h, w, channels]; OpenCV's type hints know no dtype

NOMINAL_SIDE = 400
"""Picture side to which the object sizes below refer: the demo network's input size."""
SEED = 20171200
"""Entropy of every random stream of the demo; the split and further keys select the stream."""
POOL = 32
"""Backgrounds kept ready; after every REFRESH scenes one of them is painted anew."""
REFRESH = 16
MIN_VISIBLE = 0.35
"""An object of which less shows (covered or outside the picture) is not annotated."""
_SOLID = 128  # alpha from which a pixel belongs to the object


@dataclasses.dataclass(frozen=True)
class Scene:
    """One annotated picture.

    Attributes
    ----------
    image
        BGR uint8 [h, w, 3], before JPEG compression.
    boxes
        float32 [n, 4] x, y, width, height in pixels, tight around the visible pixels.
    classes
        int64 [n], index into CATEGORIES.
    areas
        int64 [n], number of visible pixels.
    crowd
        bool [n], whether the box holds a group of objects, as COCO's iscrowd.
    owner
        uint8 [h, w], 1 + index of the object that shows in each pixel, 0 elsewhere.
    quality
        JPEG quality, 60..95, to store the picture with.
    """

    image: Image
    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    owner: npt.NDArray[np.uint8]
    quality: int


@dataclasses.dataclass(frozen=True)
class _Patch:
    """One warped object: premultiplied BGRA, and the tight box (x, y, w, h) of its solid pixels."""

    pixels: Image
    box: tuple[int, int, int, int]


def stream(split: str, *key: int) -> np.random.Generator:
    """Random numbers of one split; splits and keys never share a stream.

    Parameters
    ----------
    split
        "val", "cal", "train", or a half of the yardstick, "choose" or "judge".
    key
        Further numbers that tell streams of the split apart, such as seed and worker.
    """
    spawn_key = (("val", "cal", "train", "choose", "judge").index(split), *key)
    return np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=spawn_key))


def scenes(rng: np.random.Generator, atlas: Atlas) -> Iterator[Scene]:
    """Compose scenes without end.

    Categories are dealt from a shuffled deck of all 80, so that they come equally often. All
    randomness comes from ``rng``: the same state gives the same scenes on the same library
    versions.
    """
    library = [_pyramid(picture) for picture in atlas.pictures]
    choices = [np.flatnonzero(atlas.classes == k) for k in range(len(CATEGORIES))]
    pool = [make_background(rng) for _ in range(POOL)]
    deck: list[int] = []
    number = 0
    while True:
        number += 1
        if number % REFRESH == 0:
            pool[rng.integers(POOL)] = make_background(rng)
        canvas = _Canvas(rng, _cut(rng, pool[rng.integers(POOL)]))
        draw_distractors(rng, canvas.image, int(rng.choice([0, 0, 1, 3, 6])))
        if rng.random() < 0.08:
            crowd = int(rng.integers(len(CATEGORIES)))
            canvas.add_crowd(crowd, [library[i] for i in choices[crowd]])
        for size in _sizes(rng):
            if not deck:
                deck = rng.permutation(len(CATEGORIES)).tolist()
            picture = library[rng.choice(choices[deck[-1]])]
            if canvas.add(deck[-1], picture, size):
                deck.pop()
        yield canvas.finish()


def _pyramid(picture: Image) -> list[Image]:
    """Premultiply the alpha and halve the size repeatedly."""
    alpha = picture[..., 3:].astype(np.uint16)
    colour = (picture[..., :3] * alpha + 127) // 255
    levels: list[Image] = [np.concatenate([colour, alpha], axis=2).astype(np.uint8)]
    while min(levels[-1].shape[:2]) >= 24:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return levels


def _sizes(rng: np.random.Generator) -> list[float]:
    """Draw the objects' sizes (geometric mean of the sides, pixels at NOMINAL_SIDE)."""
    if rng.random() < 0.04:
        return []
    count = 1 + int(rng.binomial(11, rng.choice([0.12, 0.35, 0.7])))
    largest = min(240.0, 520 / count**0.5)
    sizes = np.exp(rng.uniform(np.log(38), np.log(largest), count))
    small = rng.random(count) < 0.06
    sizes[small] = rng.uniform(22, 38, int(small.sum()))
    return sorted(sizes.tolist(), reverse=True)


def _cut(rng: np.random.Generator, background: Image) -> Image:
    """Cut a random piece, bring it to a random picture size, vary its light."""
    long = int(rng.integers(320, 561))
    short = max(240, int(long * rng.choice([1.0, 0.75, 0.75, 2 / 3, rng.uniform(0.6, 1)])))
    width, height = (long, short) if rng.random() < 0.65 else (short, long)
    part = rng.uniform(0.5, 1) * SIDE / max(width, height)
    w, h = int(width * part), int(height * part)
    x, y = rng.integers(0, SIDE - w + 1), rng.integers(0, SIDE - h + 1)
    piece = background[y : y + h, x : x + w]
    image = cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        image = cv2.flip(image, 1)
    gain, shift = rng.uniform(0.6, 1.2), rng.uniform(-30, 40)
    return cv2.convertScaleAbs(image, alpha=gain, beta=max(shift, 0.0))


def _recolour(rng: np.random.Generator, picture: Image) -> Image:
    """Turn the hue a little, vary saturation, contrast and brightness (premultiplied BGRA)."""
    angle = rng.normal(0, 0.12)
    cos, sin = np.cos(angle), np.sin(angle)
    saturation, gain = rng.uniform(0.7, 1.2), rng.uniform(0.7, 1.15)
    # Rotation about the grey axis (Rodrigues), then saturation about the mean.
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    hue = cos * np.eye(3) + sin * cross + (1 - cos) * axis
    matrix = np.eye(4)
    matrix[:3, :3] = gain * (saturation * np.eye(3) + (1 - saturation) * axis) @ hue
    matrix[:3, 3] = rng.uniform(-0.08, 0.1)
    out: Image = cv2.transform(picture, matrix)
    np.minimum(out, out[..., 3:], out=out)
    return out


def _warp(rng: np.random.Generator, levels: list[Image], size: float, plain: bool) -> _Patch:
    """Scale to ``size`` pixels, rotate, shear, flip and, at times, tilt a picture."""
    height, width = levels[0].shape[:2]
    scale = size / (height * width) ** 0.5
    level = int(np.clip(np.floor(-np.log2(scale)), 0, len(levels) - 1))
    source = levels[level] if plain else _recolour(rng, levels[level])
    if rng.random() < 0.08:
        angle = rng.uniform(-np.pi / 2, np.pi / 2)
    else:
        angle = np.clip(rng.normal(0, 0.2), -0.44, 0.44)
    stretch = np.exp(rng.normal(0, 0.08))
    flip = -1 if rng.random() < 0.5 else 1
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[stretch * flip, rng.normal(0, 0.08)], [0, 1 / stretch]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    target = scale * corners @ (turn @ shear).T
    if rng.random() < 0.3:
        target += rng.uniform(-0.08, 0.08, (4, 2)) * size
    target -= target.min(axis=0) - 1
    w, h = (int(v) for v in np.ceil(target.max(axis=0)) + 2)
    edge = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [source.shape[1], source.shape[0]]
    matrix = cv2.getPerspectiveTransform(
        edge.astype(np.float32) - 0.5, target.astype(np.float32) - 0.5
    )
    pixels: Image = cv2.warpPerspective(source, matrix, (w, h), flags=cv2.INTER_LINEAR)
    if rng.random() < 0.1:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.5, 0.012 * size + 0.6))
    solid = (pixels[..., 3] >= _SOLID).view(np.uint8)
    x, y, w, h = cv2.boundingRect(solid)
    return _Patch(pixels, (x, y, w, h))


class _Canvas:
    """A scene in the making."""

    def __init__(self, rng: np.random.Generator, image: Image) -> None:
        self.rng = rng
        self.image = image
        self.height, self.width = image.shape[:2]
        self.scale = (self.height * self.width) ** 0.5 / NOMINAL_SIDE
        self.owner = np.zeros((self.height, self.width), np.uint8)
        self.classes: list[int] = []
        self.crowd: list[bool] = []
        self.full: list[int] = []  # solid pixels of each object, were nothing in front of it
        self.spots: list[tuple[float, float, float, float]] = []  # ltrb as placed

    def add(self, category: int, levels: list[Image], size: float) -> bool:
        """Place one object; False when every place tried covers others too much."""
        patch = _warp(self.rng, levels, size * self.scale, plain=False)
        _, _, w, h = patch.box
        if w >= self.width or h >= self.height or min(w, h) < 4:
            return False
        limit = self.rng.choice([0.05, 0.2, 0.45])
        over = self.rng.choice([0.0, 0.0, 0.0, 0.3])
        for _ in range(8):
            x = self.rng.uniform(-over * w, self.width - w + over * w)
            y = self.rng.uniform(-over * h, self.height - h + over * h)
            spot = (x, y, x + w, y + h)
            if all(_overlap(spot, other) <= limit for other in self.spots):
                self._start(category, crowd=False, spot=spot)
                self._paste(patch, int(x), int(y))
                return True
        return False

    def add_crowd(self, category: int, pictures: list[list[Image]]) -> None:
        """Place a cluster of many small copies, annotated as one crowd."""
        w = self.width * self.rng.uniform(0.25, 0.5)
        h = self.height * self.rng.uniform(0.2, 0.35)
        left = self.rng.uniform(0, self.width - w)
        top = self.rng.uniform(0, self.height - h)
        self._start(category, crowd=True, spot=(left, top, left + w, top + h))
        size = self.rng.uniform(20, 32) * self.scale
        for y in np.sort(self.rng.uniform(0, h - size, int(self.rng.integers(14, 40)))):
            levels = pictures[self.rng.integers(len(pictures))]
            x = self.rng.uniform(0, w - size)
            self._paste(_warp(self.rng, levels, size, plain=True), int(left + x), int(top + y))

    def _start(self, category: int, crowd: bool, spot: tuple[float, float, float, float]) -> None:
        self.classes.append(category)
        self.crowd.append(crowd)
        self.full.append(0)
        self.spots.append(spot)

    def _paste(self, patch: _Patch, x: int, y: int) -> None:
        """Blend a patch over the picture, the corner of its tight box at (x, y)."""
        left, top = x - patch.box[0], y - patch.box[1]
        h, w = patch.pixels.shape[:2]
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + w, self.width), min(top + h, self.height)
        piece = patch.pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        alpha = piece[..., 3]
        below = self.image[y0:y1, x0:x1]
        rest = cv2.cvtColor(255 - alpha, cv2.COLOR_GRAY2BGR)
        covered = cv2.multiply(below, rest, scale=1 / 255)
        self.image[y0:y1, x0:x1] = cv2.add(covered, cv2.cvtColor(piece, cv2.COLOR_BGRA2BGR))
        self.owner[y0:y1, x0:x1][alpha >= _SOLID] = len(self.classes)
        self.full[-1] += int(np.count_nonzero(patch.pixels[..., 3] >= _SOLID))

    def finish(self) -> Scene:
        """Measure what shows of each object, then give the picture a camera's faults."""
        boxes, areas, keep = [], [], []
        renumber = np.zeros(256, np.uint8)
        for index, full in enumerate(self.full):
            mask = (self.owner == index + 1).view(np.uint8)
            area = cv2.countNonZero(mask)
            # A crowd's copies cover each other; it counts as long as anything of it shows.
            if area < 12 or (not self.crowd[index] and area < MIN_VISIBLE * full):
                continue
            keep.append(index)
            boxes.append(cv2.boundingRect(mask))
            areas.append(area)
            renumber[index + 1] = len(keep)
        return Scene(
            image=_camera(self.rng, self.image),
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            classes=np.array([self.classes[i] for i in keep], np.int64),
            areas=np.array(areas, np.int64),
            crowd=np.array([self.crowd[i] for i in keep], np.bool_),
            owner=renumber[self.owner],
            quality=int(self.rng.integers(60, 96)),
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over the smaller area of two ltrb boxes."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _camera(rng: np.random.Generator, image: Image) -> Image:
    """Vary brightness, contrast and white balance; at times blur and add sensor noise."""
    gain = rng.uniform(0.75, 1.15) * np.exp(rng.normal(0, 0.04, 3))
    matrix = np.concatenate([np.diag(gain), rng.uniform(-18, 18, (3, 1))], axis=1)
    out: Image = cv2.transform(image, matrix)
    if rng.random() < 0.2:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.5, 1.4))
    if rng.random() < 0.3:
        noise: npt.NDArray[Any] = np.empty(out.shape, np.int16)
        # OpenCV's generator is several times as fast as numpy's.
        cv2.setRNGSeed(int(rng.integers(2**31)))
        cv2.randn(noise, np.zeros(3), np.full(3, rng.uniform(2, 9)))
        out = cv2.add(out, noise, dtype=cv2.CV_8U)
    return out

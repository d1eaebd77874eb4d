"""Detections drawn on the original images, for people to look at."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.coco import load_annotations
from engine.support.files import write_atomically
from harness.data.transform import BadImageError, decode, read_image
from harness.errors import HarnessError

SCORE_THRESHOLD = 0.3
"""Detections below are not drawn: they help mAP and clutter pictures."""

_LONG_SIDE = 960  # smaller images are enlarged towards it, at most twice, so labels stay readable
_CELL = (600, 480)  # width and height of a picture in the montage
_GAP = 6
_BACKDROP = (32, 32, 32)
_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)

_Image = NDArray[np.uint8]
_Colour = tuple[int, int, int]  # BGR
_Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def draw_detections(
    image_dir: Path,
    files: Sequence[str],
    detections: NDArray[np.float32],
    categories: Sequence[str],
    out_dir: Path,
    *,
    limit: int,
    annotations: Path | None = None,
) -> tuple[Path, ...]:
    """Draw detections on a few images, evenly spaced over the data set, and make a montage.

    Parameters
    ----------
    image_dir
        Folder of the original images.
    files
        Image file name of each sample index.
    detections
        float32 [R, 7]: sample index, ymin, xmin, ymax, xmax (normalised), score, label from 1.
        Rows below `SCORE_THRESHOLD` are not drawn.
    categories
        Name of each label, label 1 first.
    out_dir
        Folder of the pictures; made when absent.
    limit
        Largest number of images.
    annotations
        COCO instances JSON; its boxes are drawn dashed.

    Returns
    -------
    tuple of Path
        The montage, then one JPEG per image.

    Raises
    ------
    HarnessError
        A missing or corrupt image, a label without a name, an unwritable folder.
    """
    if limit < 1:
        raise HarnessError(f"{limit} pictures asked for; at least 1 is needed")
    truth = {} if annotations is None else _truth_boxes(annotations)
    chosen = np.unique(np.linspace(0, len(files) - 1, min(limit, len(files))).round().astype(int))
    pictures: list[_Image] = []
    paths: list[Path] = []
    for sample in chosen.tolist():
        name = files[sample]
        rows = detections[(detections[:, 0] == sample) & (detections[:, 5] >= SCORE_THRESHOLD)]
        picture = _read(image_dir / name)
        _draw_truth(picture, truth.get(name, []))
        draw_rows(picture, rows, dict(enumerate(categories, start=1)))
        legend = f"{name}   solid: detected, score >= {SCORE_THRESHOLD}"
        pictures.append(_add_caption(picture, legend + ("   dashed: annotated" if truth else "")))
        paths.append(out_dir / f"{sample:05d}_{Path(name).stem}.jpg")
    montage = out_dir / "montage.jpg"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, picture in zip([montage, *paths], [_montage(pictures), *pictures], strict=True):
            write_atomically(path, to_jpeg(picture))
    except OSError as error:
        raise HarnessError(f"cannot write pictures to {out_dir}: {error.strerror}") from error
    return (montage, *paths)


def _read(path: Path) -> _Image:
    try:
        return enlarged(decode(read_image(path)[0]))
    except BadImageError as error:
        raise HarnessError(f"image {path}: {error}") from error


def enlarged(image: _Image) -> _Image:
    """Enlarge an image, uint8 [h, w, 3], that is too small for labels that can be read."""
    import cv2

    factor = min(2.0, _LONG_SIDE / max(image.shape))
    if factor <= 1:
        return image
    enlarged = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return enlarged.astype(np.uint8, copy=False)


def _truth_boxes(annotations: Path) -> dict[str, list[list[float]]]:
    """Normalised [left, top, right, bottom] of the annotated boxes of each file name."""
    content = load_annotations(annotations)
    images: dict[Any, Mapping[str, Any]] = {image["id"]: image for image in content["images"]}
    boxes: dict[str, list[list[float]]] = {image["file_name"]: [] for image in images.values()}
    for entry in content["annotations"]:
        image = images[entry["image_id"]]
        width, height = image["width"], image["height"]
        x, y, w, h = entry["bbox"]
        boxes[image["file_name"]].append([x / width, y / height, (x + w) / width, (y + h) / height])
    return boxes


def _to_pixels(picture: _Image, box: Sequence[float]) -> _Box:
    """Scale a normalised left, top, right, bottom box; keep it inside the picture."""
    height, width = picture.shape[:2]
    left, right = (min(max(round(v * width), 0), width - 1) for v in (box[0], box[2]))
    top, bottom = (min(max(round(v * height), 0), height - 1) for v in (box[1], box[3]))
    return left, top, right, bottom


def _stroke(picture: _Image) -> int:
    return max(2, int(max(picture.shape[:2])) // 400)


def _colour(label: int) -> _Colour:
    """A bright colour per label; consecutive labels are far apart on the colour wheel."""
    golden_ratio = (math.sqrt(5) - 1) / 2
    red, green, blue = colorsys.hsv_to_rgb(label * golden_ratio % 1, 0.75, 1.0)
    return round(255 * blue), round(255 * green), round(255 * red)


def _draw_truth(picture: _Image, boxes: Sequence[Sequence[float]]) -> None:
    import cv2

    dash = 4 * _stroke(picture)
    for box in boxes:
        left, top, right, bottom = _to_pixels(picture, box)
        for start in range(left, right, 2 * dash):
            for y in (top, bottom):
                end = (min(start + dash, right), y)
                cv2.line(picture, (start, y), end, _BLACK, 3, cv2.LINE_AA)
                cv2.line(picture, (start, y), end, _WHITE, 1, cv2.LINE_AA)
        for start in range(top, bottom, 2 * dash):
            for x in (left, right):
                end = (x, min(start + dash, bottom))
                cv2.line(picture, (x, start), end, _BLACK, 3, cv2.LINE_AA)
                cv2.line(picture, (x, start), end, _WHITE, 1, cv2.LINE_AA)


def draw_rows(picture: _Image, rows: NDArray[np.float32], names: Mapping[int, str]) -> None:
    """Draw boxes, best last, then the labels, best first, where they hide no other label."""
    import cv2

    stroke = _stroke(picture)
    ordered = rows[np.argsort(rows[:, 5], kind="stable")].tolist()
    named: list[tuple[_Box, str, _Colour]] = []
    for _, ymin, xmin, ymax, xmax, score, label in ordered:
        if label not in names:
            raise HarnessError(f"label {label:g} has no name; there are {len(names)} names")
        box = _to_pixels(picture, (xmin, ymin, xmax, ymax))
        colour = _colour(int(label))
        cv2.rectangle(picture, box[:2], box[2:], _BLACK, stroke + 2, cv2.LINE_AA)
        cv2.rectangle(picture, box[:2], box[2:], colour, stroke, cv2.LINE_AA)
        named.append((box, f"{names[int(label)]} {score:.2f}", colour))
    taken: list[_Box] = []
    for box, text, colour in reversed(named):
        taken.append(_draw_label(picture, box, text, colour, taken))


def draw_boxes(
    picture: _Image, boxes: Sequence[tuple[str, Sequence[float]]], colour: _Colour
) -> None:
    """Draw boxes of one colour with their texts.

    Parameters
    ----------
    picture
        uint8 [h, w, 3]; changed.
    boxes
        Texts, which may be empty, and boxes: left, top, right, bottom as fractions of the picture.
    colour
        Blue, green, red.
    """
    import cv2

    taken: list[_Box] = []
    places = [(text, _to_pixels(picture, box)) for text, box in boxes]
    for _, box in places:
        cv2.rectangle(picture, box[:2], box[2:], _BLACK, _stroke(picture) + 2, cv2.LINE_AA)
        cv2.rectangle(picture, box[:2], box[2:], colour, _stroke(picture), cv2.LINE_AA)
    for text, box in places:
        if text:
            taken.append(_draw_label(picture, box, text, colour, taken))


def _draw_label(
    picture: _Image, box: _Box, text: str, colour: _Colour, taken: Sequence[_Box]
) -> _Box:
    import cv2

    scale = 0.28 * _stroke(picture)
    (text_width, text_height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    width, height = text_width + 8, text_height + baseline + 4
    left, top, right, bottom = box
    places = [
        (x, y) for y in (top - height, top, bottom, bottom - height) for x in (left, right - width)
    ]
    chips = [_inside(picture, x, y, width, height) for x, y in places]
    chip = next((c for c in chips if not any(_overlap(c, other) for other in taken)), chips[0])
    cv2.rectangle(picture, chip[:2], chip[2:], colour, cv2.FILLED)
    cv2.rectangle(picture, chip[:2], chip[2:], _BLACK, 1)
    blue, green, red = colour
    # luma of ITU-R BT.601: dark text on light colours
    text_colour = _BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > 110 else _WHITE
    origin = chip[0] + 4, chip[3] - baseline - 1
    cv2.putText(picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, text_colour, 1, cv2.LINE_AA)
    return chip


def _inside(picture: _Image, x: int, y: int, width: int, height: int) -> _Box:
    x = max(0, min(x, picture.shape[1] - 1 - width))
    y = max(0, min(y, picture.shape[0] - 1 - height))
    return x, y, x + width, y + height


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _add_caption(picture: _Image, text: str) -> _Image:
    import cv2

    scale = min(0.5, 0.5 * picture.shape[1] / 640)
    strip = np.full((26, picture.shape[1], 3), _BACKDROP, np.uint8)
    cv2.putText(strip, text, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, scale, _WHITE, 1, cv2.LINE_AA)
    return np.concatenate([picture, strip])


def _montage(pictures: Sequence[_Image]) -> _Image:
    """Fit the pictures into the cells of a grid that is about as wide as it is high."""
    import cv2

    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    step_x, step_y = _CELL[0] + _GAP, _CELL[1] + _GAP
    canvas = np.full((rows * step_y + _GAP, columns * step_x + _GAP, 3), _BACKDROP, np.uint8)
    for number, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        factor = min(_CELL[0] / width, _CELL[1] / height)
        size = max(1, int(width * factor)), max(1, int(height * factor))
        x = _GAP + number % columns * step_x + (_CELL[0] - size[0]) // 2
        y = _GAP + number // columns * step_y + (_CELL[1] - size[1]) // 2
        canvas[y : y + size[1], x : x + size[0]] = cv2.resize(
            picture, size, interpolation=cv2.INTER_AREA
        )
    return canvas


_LONGEST = 65_500
"""Side of a JPEG in pixels, libjpeg's limit."""


def to_jpeg(picture: _Image) -> bytes:
    """Encode a picture, uint8 [h, w, 3], BGR; one that is too long for JPEG is made smaller."""
    import cv2

    factor = _LONGEST / max(picture.shape[:2])
    if factor < 1:
        size = [max(1, int(side * factor)) for side in picture.shape[1::-1]]
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return encoded.tobytes()

"""Boxes of Open Images, a CSV file, as COCO annotations, as MLPerf's openimages.py makes them.

That script (MLPerf Inference v5.1, vision/classification_and_detection/tools) keeps the boxes of
the benchmark's classes in the order of the file, which numbers them from 1, then sorts them by
image, which numbers the images from 1. Categories count from 0. The columns are described at
https://storage.googleapis.com/openimages/web/download_v7.html.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import HarnessError

_FLAGS = ("IsOccluded", "IsInside", "IsDepiction", "IsTruncated", "IsGroupOf")
_CORNERS = ("XMin", "YMin", "XMax", "YMax")
_COLUMNS = ("ImageID", "LabelName", *_CORNERS, *_FLAGS)


@dataclass(frozen=True)
class Box:
    """One line of the file.

    Attributes
    ----------
    image
        Its ImageID.
    category
        Position of its class.
    corners
        xmin, ymin, xmax, ymax, fractions of the image.
    flags
        Value of each of the columns that begin with Is; -1: not known.
    """

    image: str
    category: int
    corners: tuple[float, float, float, float]
    flags: Mapping[str, int]


def read_boxes(boxes: Path, descriptions: Path, classes: Sequence[str]) -> list[Box]:
    """Read the boxes of some classes, in the order of the file.

    Parameters
    ----------
    boxes
        ``validation-annotations-bbox.csv``.
    descriptions
        ``class-descriptions-boxable.csv``: label name and class, without a head.
    classes
        Names of the classes; the position is the category.

    Raises
    ------
    HarnessError
        A file that cannot be read or is another one; names file and line.
    """
    rows = (row for _, row in _rows(descriptions) if len(row) == 2)
    labels = {name: label for label, name in rows}
    if missing := [name for name in classes if name not in labels]:
        raise HarnessError(
            f"{descriptions} describes no {missing[0]!r}"
            + (f", nor {len(missing) - 1} other classes" if missing[1:] else "")
        )
    categories = {labels[name]: category for category, name in enumerate(classes)}
    lines = _rows(boxes)
    _, head = next(lines, (0, []))
    if absent := [column for column in _COLUMNS if column not in head]:
        raise HarnessError(f"{boxes} has no column {absent[0]}; is it of Open Images' boxes?")
    places = [head.index(column) for column in _COLUMNS]
    found = []
    for number, row in lines:
        where = f"{boxes}, line {number}"
        if len(row) != len(head):
            raise HarnessError(f"{where}: {len(row)} values, not {len(head)}")
        image, label, *values = (row[place] for place in places)
        if label in categories:
            found.append(_box(image, categories[label], values, where))
    if not found:
        raise HarnessError(f"{boxes} has no box of the {len(classes)} classes")
    return found


def _box(image: str, category: int, values: Sequence[str], where: str) -> Box:
    if not re.fullmatch("[0-9a-f]{1,16}", image):  # a name of files and in addresses
        raise HarnessError(f"{where}: ImageID {image[:40]!a} is none of Open Images")
    try:
        xmin, ymin, xmax, ymax = map(float, values[:4])
        flags = dict(zip(_FLAGS, map(int, values[4:]), strict=True))
    except ValueError as error:
        raise HarnessError(f"{where}: {error}") from error
    if not all(map(math.isfinite, (xmin, ymin, xmax, ymax))):
        raise HarnessError(f"{where}: a corner that is no number")
    if flags["IsGroupOf"] not in (0, 1):  # COCO's iscrowd
        raise HarnessError(f"{where}: IsGroupOf is {flags['IsGroupOf']}, not 0 or 1")
    return Box(image, category, (xmin, ymin, xmax, ymax), flags)


def coco_annotations(
    boxes: Sequence[Box], classes: Sequence[str], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Make MLPerf's annotations of boxes.

    Parameters
    ----------
    boxes, classes
        See `read_boxes`.
    sizes
        Height and width of each image.

    Returns
    -------
    dict
        Content of ``openimages-mlperf.json``, keys in that script's order.
    """
    # with equal images out of order: pandas sorts objects by numpy's quicksort, and so does this
    order = np.argsort(np.array([box.image for box in boxes], dtype=object), kind="quicksort")
    numbers: dict[str, int] = {}
    annotations = []
    for place in map(int, order):
        box = boxes[place]
        height, width = sizes[box.image]
        xmin, ymin, xmax, ymax = box.corners
        bbox = [xmin * width, ymin * height, (xmax - xmin) * width, (ymax - ymin) * height]
        annotations.append(
            {
                "id": place + 1,
                "image_id": numbers.setdefault(box.image, len(numbers) + 1),
                "category_id": box.category,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": box.flags["IsGroupOf"],
                **box.flags,
            }
        )
    return {
        "info": {"dataset": "openimages_mlperf", "version": "v6"},
        "licenses": [],
        "categories": [
            {"id": category, "name": name, "supercategory": None}
            for category, name in enumerate(classes)
        ],
        "images": [
            {
                "id": number,
                "file_name": f"{image}.jpg",
                "height": sizes[image][0],
                "width": sizes[image][1],
                "license": None,
                "coco_url": None,
            }
            for image, number in numbers.items()
        ],
        "annotations": annotations,
    }


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of each row of a CSV file, but for empty lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HarnessError(f"{path} cannot be read: {error}") from error

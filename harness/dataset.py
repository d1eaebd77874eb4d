"""Which images, in which order: map files and the two data sets the project knows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError

_COCO_FOLDERS = {"val": "val2017", "cal": "train2017"}


@dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes
    ----------
    name
        ``<data set>-<split>``, for instance ``coco-val``.
    image_dir
        Folder that holds the images of the map.
    map_file
        One file name per line; the line order is the sample order.
    annotations
        COCO instances JSON; None for a split without ground truth.
    """

    name: str
    image_dir: Path
    map_file: Path
    annotations: Path | None


def known_dataset(name: str, split: str, build_dir: Path) -> Dataset:
    """Return the place of a data set's split.

    Parameters
    ----------
    name
        ``coco`` (downloaded to `build_dir`) or ``demo`` (shipped with the project).
    split
        ``val`` or ``cal``.
    build_dir
        The build folder. Map files and demo data lie relative to the repository root, which is
        where the commands run.

    Raises
    ------
    HarnessError
        Unknown name or split.
    """
    if split not in ("val", "cal"):
        raise HarnessError(f"unknown split {split!r}; the splits are val and cal")
    map_file = Path("data_maps") / name / f"{split}_map.txt"
    if name == "coco":
        data = build_dir / "data" / "coco"
        image_dir = data / _COCO_FOLDERS[split]
        annotations = data / "annotations" / "instances_val2017.json"
    elif name == "demo":
        data = Path("demo") / "data"
        image_dir = data / split
        annotations = data / "annotations" / "instances_val.json"
    else:
        raise HarnessError(f"unknown data set {name!r}; the data sets are coco and demo")
    return Dataset(
        name=f"{name}-{split}",
        image_dir=image_dir,
        map_file=map_file,
        annotations=annotations if split == "val" else None,
    )


def load_map(path: Path) -> tuple[str, ...]:
    """Read a map file: one image file name per line.

    Parameters
    ----------
    path
        UTF-8 text file.

    Returns
    -------
    tuple of str
        File names in line order, which is the order of sample indices.

    Raises
    ------
    HarnessError
        Missing, unreadable or empty file; a blank line, a path instead of a file name, or a name
        that occurs twice. Names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise HarnessError(
            f"map file {path} not found; run from the repository root or name another map"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"map file {path} cannot be read: {error}") from error
    if not lines:
        raise HarnessError(f"map file {path} is empty; it needs one image file name per line")
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            raise HarnessError(f"{path}, line {number}: blank line; remove it")
        if "/" in name or "\\" in name or name in (".", ".."):
            raise HarnessError(
                f"{path}, line {number}: {name!r} is a path; a map holds bare file names"
            )
        if name in first_line:
            raise HarnessError(
                f"{path}, line {number}: {name!r} stands in line {first_line[name]} already"
            )
        first_line[name] = number
    return tuple(first_line)


def load_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO instances JSON file and check what every user of it relies on.

    Returns
    -------
    dict
        The file's content: ``images`` (id, file_name, height, width), ``annotations``
        (id, image_id, category_id, bbox [x, y, w, h] in pixels, area, iscrowd) and
        ``categories`` (id, name).

    Raises
    ------
    HarnessError
        Missing file, invalid JSON, or a list, key, id or reference that is missing or repeated.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HarnessError(f"annotation file {path} not found") from None
    except OSError as error:
        raise HarnessError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HarnessError(f"annotation file {path} is no valid JSON: {error}") from error
    required = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
        "categories": ("id", "name"),
    }
    for section, keys in required.items():
        entries = content.get(section) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise HarnessError(f"annotation file {path} has no list {section!r}")
        for position, entry in enumerate(entries):
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise HarnessError(f"{path}: {section}[{position}] lacks {', '.join(missing)}")
        repeated = [key for key, n in Counter(entry["id"] for entry in entries).items() if n > 1]
        if repeated:
            raise HarnessError(f"{path}: id {repeated[0]} occurs more than once in {section!r}")
    image_ids = {image["id"] for image in content["images"]}
    category_ids = {category["id"] for category in content["categories"]}
    for entry in content["annotations"]:
        if entry["image_id"] not in image_ids or entry["category_id"] not in category_ids:
            raise HarnessError(
                f"{path}: annotation {entry['id']} names an image or a category "
                "that the file does not hold"
            )
    return dict(content)


def category_names(annotations: Path) -> tuple[str, ...]:
    """Return the category names; the label of a detection is its position here plus 1."""
    return tuple(str(entry["name"]) for entry in load_annotations(annotations)["categories"])


def positions_by_name(images: Sequence[dict[str, Any]], source: Path) -> dict[str, int]:
    """Map each file name of an annotation file's ``images`` to its position.

    Raises
    ------
    HarnessError
        Two images share a file name.
    """
    positions: dict[str, int] = {}
    for position, image in enumerate(images):
        name = image["file_name"]
        if name in positions:
            raise HarnessError(f"{source}: two images are named {name!r}")
        positions[name] = position
    return positions

"""A data set of one's own: its maps written, its images and annotations checked."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.coco import load_annotations, positions_by_name
from engine.support.files import write_atomically
from engine.support.progress import Progress
from harness.data.dataset import (
    BENCHMARK_SETS,
    MAPS,
    check_image_name,
    known_dataset,
    where_else,
)
from harness.data.oddities import annotation_oddities, size_oddities
from harness.data.ordering import in_order_of
from harness.data.transform import BadImageError, decode
from harness.errors import HarnessError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
"""Of what OpenCV decodes; other files of a folder are no images."""

_NAMED = 5

_ORDERED = "instances_val.by_model.json"
"""The copy of the annotations with the categories of a model, beside the link to it."""


@dataclass(frozen=True)
class Added:
    """What was found in a new data set.

    Attributes
    ----------
    val, cal
        Names of the images; `cal` is empty where there are none for calibration.
    categories
        Name of each to its number of objects, in the order of the labels.
    sizes
        Smallest and largest (height, width) of the validation images, by their area.
    oddities
        A sentence for each thing that a reader of the mAP must know.
    """

    val: tuple[str, ...]
    cal: tuple[str, ...]
    categories: dict[str, int]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    oddities: tuple[str, ...]


def add_dataset(
    name: str,
    images: Path,
    annotations: Path,
    calibration_images: Path | None,
    build_dir: Path,
    *,
    force: bool,
    model: Path | None = None,
    progress: Progress | None = None,
) -> Added:
    """Check images and annotations, then write maps and link both into the build folder.

    Validation is what the annotation file lists, in its order. Calibration is every image in
    `calibration_images` and its sub-folders, sorted by name; it needs no annotations. With a
    model, the link is to a copy of the annotations, in the build folder, too, whose categories are
    the model's classes, see `in_order_of`; ids that are texts are numbers there.

    Parameters
    ----------
    name
        Letters, digits, ``_`` and ``-``; none of `BENCHMARK_SETS`.
    images, annotations, calibration_images
        Folder, COCO instances file, folder.
    build_dir
        Where images and annotations are linked.
    force
        Replace the maps and links of a data set of this name.
    model
        ONNX file or engine with class names; None: categories go as the file has them.
    progress
        Called with the images decoded so far, and all.

    Raises
    ------
    HarnessError
        A name that does not do or is taken; an image that is missing, cannot be decoded, or lies
        outside its folder; nothing to validate or calibrate on; categories that the model does not
        have. Nothing is written then.
    EngineError
        Damaged annotations or model.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in BENCHMARK_SETS:
        raise HarnessError(
            f"{name!a} cannot be the name of a data set: letters, digits, _ and -, "
            f"but not {', '.join(BENCHMARK_SETS)}"
        )
    if (MAPS / name).exists() and not force:
        raise HarnessError(f"{MAPS / name}: exists already: name another, or pass --force")
    for folder in filter(None, (images, calibration_images)):
        if not folder.is_dir():
            raise HarnessError(f"{folder}: no such folder of images")
    content = load_annotations(annotations)
    positions_by_name(content["images"], annotations)
    matched: tuple[str, ...] = ()
    if model is not None:
        content, matched = in_order_of(model, content, annotations)
    val = [image["file_name"] for image in content["images"]]
    cal = [] if calibration_images is None else _images_below(calibration_images)
    for names, source in ((val, annotations), (cal, calibration_images)):
        for one in names:
            check_image_name(one, str(source))
    if not val or (calibration_images is not None and not cal):
        raise HarnessError(f"{calibration_images if val else annotations}: no images")
    files = [images / one for one in val]
    files += [calibration_images / one for one in cal] if calibration_images else []
    shapes = _decoded(files, images, progress)
    of_val = {one: shapes[images / one] for one in val}
    objects = Counter(entry["category_id"] for entry in content["annotations"])
    categories = {str(one["name"]): objects[one["id"]] for one in content["categories"]}
    oddities = [*matched, *annotation_oddities(content), *size_oddities(content, of_val)]
    oddities += _left_out(images, annotations, files, len(val))
    oddities += _without_ap(content, {} if model is not None else categories)
    try:
        _write_maps(name, {"val": val, "cal": cal})
        data = known_dataset(name, "val", build_dir)
        _link(images, data.image_dir)
        if data.annotations is not None:
            if model is not None:
                annotations = data.annotations.with_name(_ORDERED)
                annotations.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(annotations, json.dumps(content).encode())
            _link(annotations, data.annotations)
        if calibration_images is not None:
            _link(calibration_images, known_dataset(name, "cal", build_dir).image_dir)
    except OSError as error:
        raise HarnessError(f"{error.filename}: cannot write it: {error.strerror}") from error
    by_area = sorted(of_val.values(), key=lambda shape: shape[0] * shape[1])
    return Added(tuple(val), tuple(cal), categories, (by_area[0], by_area[-1]), tuple(oddities))


def _without_ap(content: Mapping[str, Any], objects: Mapping[str, int]) -> Iterator[str]:
    """Say which categories have no AP; `objects` is the number of each that should have some."""
    unused = [ascii(one) for one, count in objects.items() if not count]
    if unused:
        yield f"{len(unused)} categories have no object, as {unused[0]}"
    boxes = content["annotations"]
    crowded = {one["category_id"] for one in boxes if one["iscrowd"]}
    crowded -= {one["category_id"] for one in boxes if not one["iscrowd"]}
    if crowds := [one for one in content["categories"] if one["id"] in crowded]:
        name = ascii(str(crowds[0]["name"]))
        yield f"{len(crowds)} categories have crowds alone (iscrowd), as {name}: they have no AP"


def _left_out(images: Path, annotations: Path, files: Sequence[Path], val: int) -> Iterator[str]:
    """Say which images are of no use, or of two; the first `val` of the files are validation's."""
    used = set(files[:val])
    if others := sum(images / one not in used for one in _images_below(images)):
        yield f"{others} images in {images} are not in {annotations} and are left out"
    if both := len(used.intersection(files[val:])):
        yield f"{both} images are for validation and calibration"


def _images_below(folder: Path) -> list[str]:
    """Names of the images in a folder and its sub-folders, relative to it, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and path.is_file()
    )


def _decoded(
    files: Sequence[Path], images: Path, progress: Progress | None
) -> dict[Path, tuple[int, int]]:
    """Height and width of each image; every one that cannot be used is counted, the first named.

    What is missing is of `images`, where annotations name it; calibration is what is there.
    """
    shapes: dict[Path, tuple[int, int]] = {}
    bad: list[str] = []
    missing: list[Path] = []
    for number, path in enumerate(files, 1):
        try:
            if not path.is_file():
                raise BadImageError("missing" if not path.exists() else "no file")
            height, width, _ = decode(path.read_bytes()).shape
            shapes[path] = height, width
        except BadImageError as error:
            bad.append(f"{path} ({error})")
            if not path.exists():
                missing.append(path)
        except OSError as error:
            bad.append(f"{path} (cannot be read: {error.strerror})")
        if progress is not None:
            progress(number, len(files))
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        found = where_else(images, [path.relative_to(images).as_posix() for path in missing])
        raise HarnessError(
            f"{len(bad)} of {len(files)} images cannot be used: {', '.join(bad[:_NAMED])}{more}"
            f"{f'; {found}' if found else ''}"
        )
    return shapes


def _write_maps(name: str, maps: Mapping[str, Sequence[str]]) -> None:
    for split, names in maps.items():
        path = MAPS / name / f"{split}_map.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if names:
            write_atomically(path, "".join(f"{one}\n" for one in names).encode())
        else:
            path.unlink(missing_ok=True)


def _link(target: Path, link: Path) -> None:
    if link.exists() and link.samefile(target):
        return
    if link.exists() and not link.is_symlink():
        raise HarnessError(f"{link}: is there and is no link to your files; move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f"{link.name}.{os.getpid()}.tmp")
    temporary.symlink_to(target.resolve())
    temporary.replace(link)

"""COCO annotations, and the mean average precision by pycocotools."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.support.documents import parse_json

STATS = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)
"""Names of COCOeval's twelve numbers, in its order (https://cocodataset.org/#detection-eval)."""


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_size(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_flag(value: object) -> bool:
    return _is_number(value) and value in (0, 1)


def _is_id(value: object) -> bool:
    return type(value) is int


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


_Check = tuple[Callable[[object], bool], str]
_ID: _Check = (_is_id, "a whole number, as ids are unless all of a list are texts")
_SIZE: _Check = (_is_size, "a positive number of pixels")
_NUMBER: _Check = (_is_number, "a number")

_REQUIRED: dict[str, dict[str, _Check]] = {
    "images": {"id": _ID, "file_name": (_is_text, "text"), "height": _SIZE, "width": _SIZE},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (_is_box, "four numbers [x, y, w, h]"),
        "area": _NUMBER,
        "iscrowd": (_is_flag, "0 or 1"),
    },
    "categories": {"id": _ID, "name": (_is_text, "text")},
}
"""What is read of a COCO instances file (https://cocodataset.org/#format-data)."""


def _check_entry(entry: object, keys: Mapping[str, _Check], where: str) -> None:
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing or not isinstance(entry, dict):
        raise EngineError(f"{where} lacks {', '.join(missing)}")
    for key, (is_right, what) in keys.items():
        if not is_right(entry[key]):
            raise EngineError(f"{where}: {key} is {_shown(entry[key])}, not {what}")


_REFERENCES = {"images": "image_id", "categories": "category_id", "annotations": None}
"""List to the key by which annotations refer to it."""


def _shown(value: object) -> str:
    return repr(value)[:60]


def _number_texts(content: dict[str, Any], section: str, reference: str | None, path: Path) -> None:
    """Number the entries of a list whose ids are texts, which pycocotools would not sort."""
    entries = content.get(section)
    if not isinstance(entries, list) or not entries:
        return
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(one, str) for one in ids):
        return
    repeated = next((one for one, n in Counter(ids).items() if n > 1), None)
    if repeated is not None:
        raise EngineError(f"{path}: id {_shown(repeated)} occurs more than once in {section!r}")
    numbers = {str(name): number for number, name in enumerate(ids, 1)}
    content[section] = [{**entry, "id": numbers[entry["id"]]} for entry in entries]
    annotations = content.get("annotations")
    if reference is None or not isinstance(annotations, list):
        return
    named = [
        (position, entry)
        for position, entry in enumerate(annotations)
        if isinstance(entry, dict) and reference in entry
    ]
    unknown = [
        (position, entry[reference])
        for position, entry in named
        if not isinstance(entry[reference], str) or entry[reference] not in numbers
    ]
    if unknown:
        position, wrong = unknown[0]
        near = difflib.get_close_matches(str(wrong), numbers, n=1)
        raise EngineError(
            f"{path}: {len(unknown)} annotations have a {reference} that {section!r} does not "
            f"hold, the first is {_shown(wrong)} of annotations[{position}]"
            + (f"; the nearest id there is {_shown(near[0])}" if near else "; ids there are texts")
        )
    content["annotations"] = list(annotations)
    for position, entry in named:
        content["annotations"][position] = {**entry, reference: numbers[entry[reference]]}


def load_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO instances JSON file and check what every user of it relies on.

    Returns
    -------
    dict
        The file's content: ``images`` (id, file_name, height, width), ``annotations``
        (id, image_id, category_id, bbox [x, y, w, h] in pixels, area, iscrowd) and
        ``categories`` (id, name). Ids that are texts are numbered from 1, in the file's order.

    Raises
    ------
    EngineError
        Missing file, invalid JSON, another kind of file; a list, key, id or reference that is
        missing or repeated, or a value of another kind.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise EngineError(f"annotation file {path} not found") from None
    except OSError as error:
        raise EngineError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EngineError(f"annotation file {path}: {error}") from error
    if not isinstance(content, dict):
        kind = "a list, as of detections" if isinstance(content, list) else "one value"
        raise EngineError(f"{path} is no COCO instances file: it holds {kind}")
    for section, references in _REFERENCES.items():
        _number_texts(content, section, references, path)
    for section, keys in _REQUIRED.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            raise EngineError(f"{path} is no COCO instances file: it has no list {section!r}")
        for position, entry in enumerate(entries):
            _check_entry(entry, keys, f"{path}: {section}[{position}]")
        repeated = [key for key, n in Counter(entry["id"] for entry in entries).items() if n > 1]
        if repeated:
            raise EngineError(f"{path}: id {repeated[0]} occurs more than once in {section!r}")
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[section]}
        unknown = [entry for entry in content["annotations"] if entry[key] not in known]
        if unknown:
            raise EngineError(
                f"{path}: {len(unknown)} annotations have a {key} that {section!r} does not hold, "
                f"the first is {unknown[0][key]} of annotation {unknown[0]['id']}"
            )
    return dict(content)


def positions_by_name(images: Sequence[dict[str, Any]], source: Path) -> dict[str, int]:
    """Map each file name of an annotation file's ``images`` to its position.

    Raises
    ------
    EngineError
        Two images share a file name.
    """
    positions: dict[str, int] = {}
    for position, image in enumerate(images):
        name = image["file_name"]
        if name in positions:
            raise EngineError(f"{source}: two images are named {name!r}")
        positions[name] = position
    return positions


def coco_stats(
    content: Mapping[str, Any], images: Sequence[Mapping[str, Any]], rows: NDArray[np.float32]
) -> dict[str, float]:
    """COCOeval's twelve numbers by name, `STATS`; see `coco_evaluation`.

    -1 where no ground truth falls in the class.
    """
    stats = coco_evaluation(content, images, rows).stats
    return dict(zip(STATS, (float(value) for value in stats), strict=True))


def coco_evaluation(
    content: Mapping[str, Any], images: Sequence[Mapping[str, Any]], rows: NDArray[np.float32]
) -> Any:
    """Evaluate detections as MLPerf's ``accuracy-coco.py --use-inv-map`` does.

    Parameters
    ----------
    content
        Annotation file, as `load_annotations` gives it.
    images
        Its images that are evaluated, each once; those without detections count.
    rows
        float32 [R, 7]: position in `images`, ymin, xmin, ymax, xmax (normalised), score, label;
        label L is the L-th category, 0 the background, whatever the model's own count from.

    Returns
    -------
    pycocotools.cocoeval.COCOeval
        After its summary; boxes in pixels, each detection's id its row's number from 1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = rows[rows[:, 6] > 0]  # the background matches nothing, but a category may have the id 0
    categories = np.array([entry["id"] for entry in content["categories"]], np.int64)
    slots = rows[:, 0].astype(np.int64)
    # float32 arithmetic as in accuracy-coco.py
    size = np.array([[image["height"], image["width"]] for image in images], np.float32)
    ymin, xmin, ymax, xmax = (rows[:, 1:5] * np.tile(size, 2)[slots]).T
    boxes = np.stack([xmin, ymin, xmax - xmin, ymax - ymin], axis=1).astype(np.float64)
    detections = [
        {
            "id": number,
            "image_id": images[slot]["id"],
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": 0,
        }
        for number, (slot, category, box, score) in enumerate(
            zip(
                slots.tolist(),
                categories[rows[:, 6].astype(np.int64) - 1].tolist(),
                boxes.tolist(),
                rows[:, 5].tolist(),
                strict=True,
            ),
            start=1,  # COCOeval takes id 0 for "no match"
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        # COCO.loadRes fails on an empty list and adds a polygon to every box
        truth.dataset = content
        found.dataset = {**content, "annotations": detections}
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = [image["id"] for image in images]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation

"""COCO mAP of an accuracy run, by the rules of MLPerf's ``accuracy-coco.py --use-inv-map``.

Rules kept (MLPerf Inference v2.0, vision/classification_and_detection/tools/accuracy-coco.py; in
v5.1 ``accuracy-openimages.py`` has the same, but for labels that count from 0):
the first record of a sample counts and repeated ones are skipped; a payload of fewer than seven
floats is an image without detections; boxes are scaled in float32 by the image size that the
annotation file gives; label L is the L-th category of the annotation file; only the images that
occur in the log are evaluated.

Where that script crashes or silently miscounts, this module stops with an error: unreadable
logs, payloads that are no whole rows, NaN, labels outside 0..C, unknown samples. Where it carries
on and the number stays meaningful, the same number comes with a warning: rows that name another
sample than their record, rows of the background label, coordinates that look like pixels, images
that are not in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.coco import (
    STATS,
    coco_evaluation,
    coco_stats,
    load_annotations,
    positions_by_name,
)
from harness.data.oddities import annotation_oddities
from harness.errors import HarnessError
from harness.loadgen.accuracy_log import AccuracyLog, read_accuracy_log

_SUSPICIOUS = 0.3
"""AP50 below which other readings of the rows are tried, on the first `_TRIED` images."""
_TRIED = 200
_FAR = 4.0  # unclipped boxes reach a little over the edge; pixel coordinates reach hundreds


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracy of a run.

    Attributes
    ----------
    mAP
        Average precision over IoU 0.50..0.95, all areas, 100 detections per image; a fraction.
        -1 when the images seen have no ground truth.
    AP50
        The same at IoU 0.50 alone.
    stats
        COCOeval's twelve numbers by name, `STATS`; -1 where no ground truth falls in the class.
    images_seen
        Images that the log holds; only these are evaluated.
    images_total
        Images in the annotation file.
    detections
        Detection rows evaluated.
    duplicates
        Records skipped because their sample came before.
    empties
        Images seen that have no detections.
    warnings
        One sentence for each thing that a reader of the number must know.
    """

    mAP: float  # noqa: N815 - the field's name for it
    AP50: float
    stats: Mapping[str, float]
    images_seen: int
    images_total: int
    detections: int
    duplicates: int
    empties: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """An accuracy log held against annotations.

    Attributes
    ----------
    log
        The log; its labels count from 1 here, whatever the file says.
    content
        The annotation file.
    images
        Its image of each of the log's samples.
    rows
        float32 [R, 7], as `engine.data.coco.coco_evaluation` takes them.
    first_label
        Label of the first category in the file.
    coco
        pycocotools' COCOeval.
    """

    log: AccuracyLog
    content: Mapping[str, Any]
    images: Sequence[dict[str, Any]]
    rows: NDArray[np.float32]
    first_label: int
    coco: Any


def evaluate(
    log_path: Path,
    annotations: Path,
    files: Sequence[str] | None = None,
    first_label: int = 1,
) -> AccuracyResult:
    """Evaluate an accuracy log against COCO annotations; see `evaluation_of`."""
    return accuracy_of(evaluation_of(log_path, annotations, files, first_label))


def accuracy_of(found: Evaluation) -> AccuracyResult:
    """What an evaluation comes to."""
    stats = dict(zip(STATS, map(float, found.coco.stats), strict=True))
    total = len(found.content["images"])
    return AccuracyResult(
        mAP=stats["AP"],
        AP50=stats["AP50"],
        stats=stats,
        images_seen=len(found.images),
        images_total=total,
        detections=len(found.log.rows),
        duplicates=found.log.duplicates,
        empties=found.log.empties,
        warnings=(
            *_warnings(found.log, found.content, total, stats["AP"]),
            *_better_reading(found, stats["AP50"]),
        ),
    )


def evaluation_of(
    log_path: Path,
    annotations: Path,
    files: Sequence[str] | None = None,
    first_label: int = 1,
) -> Evaluation:
    """Hold an accuracy log against COCO annotations.

    Parameters
    ----------
    log_path
        ``mlperf_log_accuracy.json`` of any benchmark run.
    annotations
        COCO instances JSON.
    files
        Image file name of each sample index. None: the sample index is the position in the
        annotation file's ``images``, as in MLPerf's own scripts.
    first_label
        Label of the first category in the log: 1, or 0 of a model without background.

    Raises
    ------
    HarnessError
        Unreadable log or annotations, a sample index without an image, a label without a
        category.
    """
    log = read_accuracy_log(log_path)
    content = load_annotations(annotations)
    images = _images_of_samples(log, log_path, content, annotations, files)
    categories = len(content["categories"])
    labels = log.rows[:, 6]
    last = categories - 1 + first_label
    wrong = (labels != np.trunc(labels)) | (labels < 0) | (labels > last)
    if wrong.any():
        first = int(wrong.argmax())
        raise HarnessError(
            f"{log_path}: {wrong.sum()} detection rows have a label outside "
            f"{first_label}..{last}, the first is {labels[first]:g} of qsl_idx "
            f"{log.rows[first, 0]:.0f}; were padding rows logged, or other annotations used?"
        )
    log.rows[:, 6] += 1 - first_label
    slot_of_sample = np.zeros(max(log.samples) + 1, np.int64)
    slot_of_sample[list(log.samples)] = np.arange(len(log.samples))
    rows = log.rows.copy()
    rows[:, 0] = slot_of_sample[log.rows[:, 0].astype(np.int64)]
    coco = coco_evaluation(content, images, rows)
    return Evaluation(log, content, images, rows, first_label, coco)


def _images_of_samples(
    log: AccuracyLog,
    log_path: Path,
    content: Mapping[str, Any],
    annotations: Path,
    files: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """The annotation file's image of each of the log's samples."""
    images = content["images"]
    known = len(images) if files is None else len(files)
    for sample in log.samples:
        if sample >= known:
            raise HarnessError(
                f"{log_path}: qsl_idx {sample} is out of range, the data set has {known} images; "
                "does the log belong to it?"
            )
    if files is None:
        return [images[sample] for sample in log.samples]
    positions = positions_by_name(images, annotations)
    missing = [files[sample] for sample in log.samples if files[sample] not in positions]
    if missing:
        raise HarnessError(
            f"{annotations} lacks {len(missing)} images of the log, the first is {missing[0]}"
        )
    return [images[positions[files[sample]]] for sample in log.samples]


def _warnings(
    log: AccuracyLog, content: Mapping[str, Any], total: int, average_precision: float
) -> tuple[str, ...]:
    seen = len(log.samples)
    # COCOeval asks for the categories of the annotation file alone
    background = int((log.rows[:, 6] == 0).sum())
    remote = int((np.abs(log.rows[:, 1:5]) > _FAR).any(axis=1).sum())
    inverted = int((log.rows[:, 3:5] < log.rows[:, 1:3]).any(axis=1).sum())
    odd_scores = int(((log.rows[:, 5] < 0) | (log.rows[:, 5] > 1)).sum())
    cases = [
        (seen < total, f"only {seen} of {total} images were seen; mAP is over these alone"),
        (log.mismatches, f"{log.mismatches} rows name another sample than their record"),
        (background, f"{background} rows have the background label 0 and match nothing"),
        (remote, f"{remote} rows have coordinates far outside 0..1; they must be normalised"),
        (not len(log.rows), "no image has a detection"),
        (average_precision < 0, "the images seen have no ground truth, so mAP is undefined (-1)"),
        (
            inverted,
            f"{inverted} rows end before they begin; a row is ymin, xmin, ymax, xmax, as fractions",
        ),
        (odd_scores, f"{odd_scores} rows have a score outside 0..1"),
    ]
    return (*(text for applies, text in cases if applies), *annotation_oddities(content))


def _better_reading(evaluation: Evaluation, found: float) -> list[str]:
    """Say by which other order or unit of the rows much more is found, where little is.

    `found` is AP50 of the rows as they are.
    """
    content, rows, first = evaluation.content, evaluation.rows, evaluation.first_label
    if not 0 <= found < _SUSPICIOUS or not len(rows):
        return []
    few = rows[rows[:, 0] < _TRIED]
    tried = evaluation.images[:_TRIED]
    sizes = np.array([(image["height"], image["width"]) for image in tried], np.float32)
    height, width = sizes[few[:, 0].astype(np.int64)].T
    a, b, c, d = few[:, 1:5].T
    unit = "fractions"
    if 2 * (np.abs(few[:, 1:5]) > _FAR).any(axis=1).sum() > len(few):
        unit = "pixels"
    orders = {
        "ymin, xmin, ymax, xmax": (a, b, c, d),
        "xmin, ymin, xmax, ymax": (b, a, d, c),
        "ymin, xmin, height, width": (a, b, a + c, b + d),
        "xmin, ymin, width, height": (b, a, b + d, a + c),
        "the centre's x, y, width, height": (b - d / 2, a - c / 2, b + d / 2, a + c / 2),
    }
    places = {entry["id"]: place for place, entry in enumerate(content["categories"], 1)}
    label = few[:, 6]
    said = label - 1 + first
    labels = {f"counted from {number}": said + 1 - number for number in range(3)}
    del labels[f"counted from {first}"]
    labels["the categories' ids"] = np.array([places.get(int(one), 0) for one in said], np.float32)

    def ap50(corners: Sequence[NDArray[np.float32]], label: NDArray[np.float32]) -> float:
        scale = (height, width, height, width) if unit == "pixels" else (1, 1, 1, 1)
        boxes = [corner / by for corner, by in zip(corners, scale, strict=True)]
        kept = (label >= 1) & (label <= len(places))
        again = np.stack([few[:, 0], *boxes, few[:, 5], label], axis=1)[kept]
        return coco_stats(content, tried, again)["AP50"] if len(again) else 0.0

    as_is = coco_stats(content, tried, few)["AP50"]
    (usual, corners), *_ = orders.items()
    readings = {f"boxes are {name} in {unit}": ap50(box, label) for name, box in orders.items()}
    readings |= {f"labels are {name}": ap50(corners, one) for name, one in labels.items()}
    if unit == "fractions":
        del readings[f"boxes are {usual} in {unit}"]
    best = max(readings, key=lambda name: readings[name])
    if readings[best] < 2 * as_is + _SUSPICIOUS / 2:
        return []
    return [
        f"AP50 of the first {len(tried)} images is {as_is:.3f}, and would be {readings[best]:.3f} "
        f"if {best}; a row is ymin, xmin, ymax, xmax as fractions, score, label from {first}"
    ]

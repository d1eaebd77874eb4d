"""COCO mAP of an accuracy run, by the rules of MLPerf's ``accuracy-coco.py --use-inv-map``.

Rules kept (MLPerf Inference v2.0, vision/classification_and_detection/tools/accuracy-coco.py):
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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.coco import coco_stats, load_annotations, positions_by_name
from engine.protocol import DETECTION_FIELDS
from harness.errors import HarnessError

_SAMPLE_LIMIT = 2**24  # payloads carry the sample index as float32
_FAR = 4.0  # unclipped boxes reach a little over the edge; pixel coordinates reach hundreds


@dataclass(frozen=True)
class AccuracyLog:
    """Content of a LoadGen accuracy log.

    Attributes
    ----------
    rows
        float32 [R, 7]: sample index, ymin, xmin, ymax, xmax, score, label; in log order. The
        sample index is that of the record, whatever the payload says.
    samples
        Sample indices in log order, each once.
    duplicates
        Records skipped because their sample came before.
    empties
        Samples without detections.
    mismatches
        Rows whose payload names another sample than their record.
    """

    rows: NDArray[np.float32]
    samples: tuple[int, ...]
    duplicates: int
    empties: int
    mismatches: int


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


def read_accuracy_log(path: Path) -> AccuracyLog:
    """Read ``mlperf_log_accuracy.json``.

    Parameters
    ----------
    path
        JSON list of ``{"seq_id", "qsl_idx", "data"}``; data is the hexadecimal form of
        little-endian float32 rows of seven.

    Returns
    -------
    AccuracyLog
        Its content.

    Raises
    ------
    HarnessError
        The log is missing, no JSON (cut short), without samples, or a record has no valid
        sample index, no hexadecimal data, a length that is no whole number of rows, or a NaN
        or infinite value.
    """
    payloads: dict[int, bytes] = {}
    duplicates = 0
    for position, record in enumerate(_records(path)):
        where = f"{path}, record {position}"
        if not isinstance(record, dict):
            raise HarnessError(f"{where} is no object with qsl_idx and data")
        sample, data = record.get("qsl_idx"), record.get("data")
        if type(sample) is not int or not 0 <= sample < _SAMPLE_LIMIT:
            raise HarnessError(f"{where}: qsl_idx is {sample!r}, not a sample index")
        if sample in payloads:
            duplicates += 1
            continue
        try:
            payload = bytes.fromhex(data if isinstance(data, str) else "not text")
        except ValueError:
            raise HarnessError(f"{where} (qsl_idx {sample}): data is not hexadecimal") from None
        row_bytes = 4 * DETECTION_FIELDS
        if len(payload) % 4 or (len(payload) > row_bytes and len(payload) % row_bytes):
            raise HarnessError(
                f"{where} (qsl_idx {sample}): {len(payload)} bytes of data are no whole number "
                f"of rows of {row_bytes} bytes"
            )
        payloads[sample] = payload if len(payload) >= row_bytes else b""
    if not payloads:
        raise HarnessError(f"{path} holds no samples; was this an accuracy run?")
    rows = np.frombuffer(b"".join(payloads.values()), "<f4").reshape(-1, DETECTION_FIELDS)
    rows = rows.astype(np.float32)
    samples = np.fromiter(payloads, np.int64)
    lengths = np.array([len(payload) for payload in payloads.values()]) // row_bytes
    sample_of_row = np.repeat(samples, lengths)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise HarnessError(
            f"{path}: {bad.sum()} detection rows hold NaN or infinite values, the first belongs "
            f"to qsl_idx {sample_of_row[bad.argmax()]}"
        )
    mismatches = int((np.trunc(rows[:, 0]) != sample_of_row).sum())
    rows[:, 0] = sample_of_row
    return AccuracyLog(
        rows=rows,
        samples=tuple(payloads),
        duplicates=duplicates,
        empties=int((lengths == 0).sum()),
        mismatches=mismatches,
    )


def evaluate(
    log_path: Path, annotations: Path, files: Sequence[str] | None = None
) -> AccuracyResult:
    """Evaluate an accuracy log against COCO annotations.

    Parameters
    ----------
    log_path
        ``mlperf_log_accuracy.json`` of any benchmark run.
    annotations
        COCO instances JSON.
    files
        Image file name of each sample index. None: the sample index is the position in the
        annotation file's ``images``, as in MLPerf's own scripts.

    Returns
    -------
    AccuracyResult
        The numbers.

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
    wrong = (labels != np.trunc(labels)) | (labels < 0) | (labels > categories)
    if wrong.any():
        first = int(wrong.argmax())
        raise HarnessError(
            f"{log_path}: {wrong.sum()} detection rows have a label outside 1.."
            f"{categories}, the first is {labels[first]:g} of qsl_idx "
            f"{log.rows[first, 0]:.0f}; were padding rows logged, or other annotations used?"
        )
    slot_of_sample = np.zeros(max(log.samples) + 1, np.int64)
    slot_of_sample[list(log.samples)] = np.arange(len(log.samples))
    rows = log.rows.copy()
    rows[:, 0] = slot_of_sample[log.rows[:, 0].astype(np.int64)]
    stats = coco_stats(content, images, rows)
    total = len(content["images"])
    return AccuracyResult(
        mAP=stats["AP"],
        AP50=stats["AP50"],
        stats=stats,
        images_seen=len(images),
        images_total=total,
        detections=len(rows),
        duplicates=log.duplicates,
        empties=log.empties,
        warnings=_warnings(log, content, total, stats["AP"]),
    )


def _records(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HarnessError(f"accuracy log {path} not found") from None
    except OSError as error:
        raise HarnessError(f"accuracy log {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HarnessError(
            f"accuracy log {path} is no valid JSON ({error}); did the run end properly?"
        ) from error
    if not isinstance(records, list):
        raise HarnessError(f"accuracy log {path} is no JSON list of samples")
    return records


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
    zero_id = any(entry["id"] == 0 for entry in content["annotations"])
    cases = [
        (seen < total, f"only {seen} of {total} images were seen; mAP is over these alone"),
        (log.mismatches, f"{log.mismatches} rows name another sample than their record"),
        (background, f"{background} rows have the background label 0 and match nothing"),
        (remote, f"{remote} rows have coordinates far outside 0..1; they must be normalised"),
        (not len(log.rows), "no image has a detection"),
        (average_precision < 0, "the images seen have no ground truth, so mAP is undefined (-1)"),
        (zero_id, "annotation id 0 never counts as matched; number annotations from 1"),
    ]
    return tuple(text for applies, text in cases if applies)

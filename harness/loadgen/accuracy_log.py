"""LoadGen's accuracy log: the detections of every sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.protocol import DETECTION_FIELDS
from engine.support.documents import parse_json
from harness.errors import HarnessError

_SAMPLE_LIMIT = 2**24  # payloads carry the sample index as float32


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


def _records(path: Path) -> list[Any]:
    try:
        records = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise HarnessError(f"accuracy log {path} not found") from None
    except OSError as error:
        raise HarnessError(f"accuracy log {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise HarnessError(
            f"accuracy log {path} is no valid JSON ({error}); did the run end properly?"
        ) from error
    if not isinstance(records, list):
        raise HarnessError(f"accuracy log {path} is no JSON list of samples")
    return records

"""LoadGen's own log files: what they say, and whether they are complete.

LoadGen's streams fail silently, for instance on a full disk, so nothing here trusts a file that
does not end as LoadGen ends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.support.documents import parse_json
from harness.errors import HarnessError
from harness.loadgen.accuracy_log import read_accuracy_log

SUMMARY = "mlperf_log_summary.txt"
DETAIL = "mlperf_log_detail.txt"
ACCURACY = "mlperf_log_accuracy.json"

PERCENTILES = ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")

_CONDITIONS = {
    "result_min_duration_met": "the minimum duration was not reached",
    "result_min_queries_met": "the minimum number of queries was not reached",
    "result_perf_constraints_met": "the latency bound was not kept",
    "early_stopping_met": "too few queries for the confidence that early stopping demands",
}
_PREFIX = ":::MLLOG "
_SUMMARY_END = re.compile(r"encountered.* (during test|See detailed log)\.\s*\Z")
_NS_PER_MS = 1e6


@dataclass(frozen=True)
class DetailLog:
    """A parsed detail log.

    Attributes
    ----------
    values
        Key to the last value logged under it.
    errors
        Messages that LoadGen marked as errors.
    """

    values: Mapping[str, Any]
    errors: tuple[str, ...]

    @property
    def valid(self) -> bool | None:
        """LoadGen's verdict of a performance run; None in an accuracy run."""
        verdict = self.values.get("result_validity")
        return None if verdict is None else verdict == "VALID" and not self.errors

    @property
    def complaints(self) -> tuple[str, ...]:
        """LoadGen's errors, and what an INVALID run missed."""
        missed = [
            text
            for key, text in _CONDITIONS.items()
            if self.values.get("result_validity") == "INVALID" and self.values.get(key) is False
        ]
        advice = str(self.values.get("result_invalid_reason", "")).strip()
        return (*self.errors, *missed, *([advice] if advice else []))

    @property
    def effective(self) -> dict[str, Any]:
        """Settings that LoadGen used, without the prefix ``effective_``."""
        prefix = "effective_"
        return {
            key.removeprefix(prefix): value
            for key, value in self.values.items()
            if key.startswith(prefix)
        }

    @property
    def latency_ms(self) -> dict[str, float]:
        """Latency of queries in milliseconds: min, mean, max and percentiles; empty if unknown."""
        names = {"min": "min_latency", "mean": "mean_latency", "max": "max_latency"}
        names |= {f"p{float(p):g}": f"{p}_percentile_latency" for p in PERCENTILES}
        return {
            name: self.values[f"result_{key}_ns"] / _NS_PER_MS
            for name, key in names.items()
            if f"result_{key}_ns" in self.values
        }


def read_detail(path: Path) -> DetailLog:
    """Parse a detail log, whose lines are ``:::MLLOG`` and a JSON object.

    Raises
    ------
    HarnessError
        When the file cannot be read or a line is not complete.
    """
    values: dict[str, Any] = {}
    errors: list[str] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            if not line.startswith(_PREFIX):
                raise ValueError("no :::MLLOG line")
            entry = parse_json(line[len(_PREFIX) :])
            values[entry["key"]] = entry["value"]
            if entry["metadata"]["is_error"]:
                errors.append(f"{entry['key']}: {entry['value']}")
        except (ValueError, LookupError, TypeError) as error:
            raise HarnessError(
                f"{path}, line {number}: not a complete LoadGen log line ({error}); "
                "was the disk full?"
            ) from error
    return DetailLog(values, tuple(errors))


def read_complete(directory: Path, *, accuracy: bool) -> DetailLog:
    """Parse the logs of one run after checking that all of them are complete.

    Parameters
    ----------
    directory
        Where the files lie.
    accuracy
        Whether it was an accuracy run: the accuracy log must hold every sample; else the summary
        and the detail log must hold a verdict.

    Raises
    ------
    HarnessError
        When a file is missing, cut off, or lacks what a whole run leaves.
    """
    detail = read_detail(directory / DETAIL)
    last = "power_end" if accuracy else "num_errors"
    if last not in detail.values:
        raise HarnessError(f"{directory / DETAIL}: the log is cut off; was the disk full?")
    summary = _read(directory / SUMMARY)
    if not _SUMMARY_END.search(summary) or (not accuracy and "Result is : " not in summary):
        raise HarnessError(f"{directory / SUMMARY}: the log is cut off; was the disk full?")
    if accuracy:
        expected = int(detail.values["effective_accuracy_sample_count"])
        found = len(read_accuracy_log(directory / ACCURACY).samples)
        if found != expected:
            raise HarnessError(
                f"{directory / ACCURACY}: {found} of {expected} samples; was the disk full?"
            )
    return detail


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"{path}: cannot read LoadGen's log: {error}") from error

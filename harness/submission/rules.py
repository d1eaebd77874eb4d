"""Verdicts of the compliance tests, from LoadGen's logs.

The rules are those of MLPerf Inference v2.0, compliance/nvidia/*/README.md and the scripts beside
them, and the files say what those scripts print, which the submission checker looks for. Scores
come from the detail logs: LoadGen 6 writes "90.0th percentile" into its summary, where the scripts
of v2.0 look for "90th" and read no score at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.support.documents import parse_json
from engine.support.files import write_atomically
from harness.errors import HarnessError
from harness.loadgen.accuracy_log import read_accuracy_log
from harness.loadgen.log import ACCURACY, DetailLog
from harness.results.accuracy import evaluate

PASS = "TEST PASS"  # noqa: S105
FAIL = "TEST FAIL"

_SCORES = {
    "Offline": "result_samples_per_second",
    "Server": "result_scheduled_samples_per_sec",
    "SingleStream": "result_90.00_percentile_latency_ns",
    "MultiStream": "result_99.00_percentile_per_query_latency_ns",
}
_SHORT_NS = {"SingleStream": 200_000, "MultiStream": 1_600_000}
"""Latencies up to which a test is allowed `_SHORT_TOLERANCE`."""
_SHORT_TOLERANCE = 0.20
_MAP_TOLERANCE = 0.01

TOLERANCES = {"TEST01": 0.10, "TEST04": 0.10, "TEST05": 0.05}


@dataclass(frozen=True)
class Check:
    """One verification.

    Attributes
    ----------
    passed
        The verdict.
    files
        Name and text of the files that state it.
    figures
        What was compared, by name.
    """

    passed: bool
    files: dict[str, str]
    figures: dict[str, float]


def score(detail: DetailLog, scenario: str) -> float:
    """Figure that the tests compare: samples per second, or a latency in nanoseconds."""
    return float(detail.values[_SCORES[scenario]])


def verify_performance(test: str, scenario: str, reference: DetailLog, audited: DetailLog) -> Check:
    """Compare a TEST01 or TEST05 run with the base run: equal within the tolerance, both VALID.

    Parameters
    ----------
    test
        ``TEST01`` or ``TEST05``.
    scenario
        Of both runs.
    reference, audited
        Their detail logs.
    """
    base, tested = score(reference, scenario), score(audited, scenario)
    tolerance = _tolerance(test, scenario, base)
    if reference.values.get("result_validity") != "VALID":
        verdict = f"{FAIL}: Reference results are invalid"
    elif audited.values.get("result_validity") != "VALID":
        verdict = f"{FAIL}: Test results are invalid"
    elif abs(tested - base) < tolerance * base:
        verdict = PASS
    else:
        verdict = f"{FAIL}: Test score invalid"
    lines = [
        "Verifying performance.",
        *_error_lines(reference, "reference"),
        *_error_lines(audited, "test"),
        f"reference score = {base:.12g}",
        f"test score = {tested:.12g}",
        verdict,
    ]
    return _performance_check(lines, verdict == PASS, {"reference": base, "test": tested})


def verify_same_sample(scenario: str, unique: DetailLog, same: DetailLog) -> Check:
    """Compare TEST04-B, one sample again and again, with TEST04-A, different samples.

    B must not be faster than A by more than the tolerance. It may be slower in every scenario, as
    the test's README says; the script of v2.0 mixes up the directions in MultiStream.
    """
    first, second = score(unique, scenario), score(same, scenario)
    tolerance = _tolerance("TEST04", scenario, first)
    latency = scenario in _SHORT_NS
    slower = second > first if latency else second < first
    near = abs(second - first) < tolerance * first
    passed = slower or near
    lines = [
        "Verifying performance.",
        *_error_lines(unique, "TEST04-A"),
        *_error_lines(same, "TEST04-B"),
        f"TEST04-A score = {first:.12g}",
        f"TEST04-B score = {second:.12g}",
        PASS if passed else f"{FAIL}: Test score invalid",
    ]
    if slower and not near:
        lines.append("Note: TEST04-B is significantly slower than TEST04-A")
    return _performance_check(lines, passed, {"TEST04-A": first, "TEST04-B": second})


def verify_accuracy(
    base: Path,
    audited: Path,
    annotations: Path | None,
    files: Sequence[str],
    first_label: int = 1,
) -> Check:
    """Compare the answers logged in performance mode with those of the accuracy run.

    They must be the same bytes; v2.0's script compares their first bytes alone. Where they are
    not, the mAP over the images concerned must agree within 1 %, an image counting with an answer
    that differs, if it got one.

    Parameters
    ----------
    base, audited
        Accuracy logs of the accuracy run and of TEST01.
    annotations
        COCO annotations; None: different answers fail.
    files, first_label
        See `harness.results.accuracy.evaluation_of`.

    Raises
    ------
    HarnessError
        When a log cannot be read, or does not belong to the annotations.
    """
    expected, duplicates, unequal = _by_sample(base)
    entries = _entries(audited)
    known = [item for item in entries if item[0] in expected]
    different = [item for item in known if item[1] != expected[item[0]]]
    missing = len(entries) - len(known)
    same = not different and bool(known)
    lines = [
        "Verifying accuracy. This might take a while...",
        f"num_acc_log_entries = {len(expected) + duplicates}",
        f"num_acc_log_duplicate_keys = {duplicates}",
        f"num_acc_log_data_mismatch = {unequal}",
        f"num_perf_log_entries = {len(entries)}",
        f"num_perf_log_qsl_idx_match = {len(known)}",
        f"num_perf_log_data_mismatch = {len(different)}",
        f"num_missing_qsl_idxs = {missing}",
        PASS if same and not missing else FAIL,
    ]
    texts = {"verify_accuracy.txt": _text(lines)}
    figures = {"answers": float(len(entries)), "different": float(len(different))}
    passed = same and not missing
    if different and not missing and annotations is not None:
        answers = dict(known) | dict(different)
        wanted, found = (
            _mean_average_precision(some, annotations, files, first_label)
            for some in ({i: expected[i] for i in answers}, answers)
        )
        texts["baseline_accuracy.txt"] = map_line(wanted)
        texts["compliance_accuracy.txt"] = map_line(found)
        figures |= {"baseline mAP": wanted, "mAP": found}
        passed = wanted > 0 and abs(found - wanted) <= _MAP_TOLERANCE * wanted
    return Check(passed, texts, figures)


def map_line(value: float) -> str:
    """Line that MLPerf's tools look for, of an mAP in 0..1."""
    return f"mAP={100 * value:.3f}%\n"


def _mean_average_precision(
    answers: dict[int, str], annotations: Path, files: Sequence[str], first_label: int
) -> float:
    with TemporaryDirectory() as folder:
        log = Path(folder) / ACCURACY
        records = [{"qsl_idx": sample, "data": data} for sample, data in sorted(answers.items())]
        write_atomically(log, json.dumps(records).encode())
        return evaluate(log, annotations, files, first_label).mAP


def _by_sample(log: Path) -> tuple[dict[int, str], int, int]:
    """First answer of each sample, the number of further ones, and of those that differ."""
    read_accuracy_log(log)  # refuses what is no accuracy log
    answers: dict[int, str] = {}
    entries = _entries(log)
    unequal = sum(answers.setdefault(sample, data) != data for sample, data in entries)
    return answers, len(entries) - len(answers), unequal


def _entries(log: Path) -> list[tuple[int, str]]:
    """Sample index and answer, in hexadecimal, of each record."""
    try:
        return [(item["qsl_idx"], item["data"].upper()) for item in parse_json(log.read_bytes())]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise HarnessError(f"{log}: not a complete accuracy log: {error}") from error


def _tolerance(test: str, scenario: str, reference: float) -> float:
    short = reference <= _SHORT_NS.get(scenario, 0)
    if test != "TEST01" and scenario == "MultiStream":
        short = False  # v2.0 relaxes TEST04 and TEST05 for SingleStream alone
    return _SHORT_TOLERANCE if short else TOLERANCES[test]


def _error_lines(detail: DetailLog, what: str) -> list[str]:
    count = len(detail.errors)
    return [f"WARNING: {count} ERROR reported in {what} results"] if count else []


def _performance_check(lines: list[str], passed: bool, figures: dict[str, float]) -> Check:
    return Check(passed, {"verify_performance.txt": _text(lines)}, figures)


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"

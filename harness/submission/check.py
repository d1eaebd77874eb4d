"""A check of a submission tree against the rules of MLPerf Inference v2.0.

It looks at the tree alone, as a reviewer does. The rules and limits are those of v2.0's
tools/submission/submission-checker.py for ssd-large (that is ssd-resnet34), taken strictly: what
that script only logs, such as too short a duration, is an error here. Results inferred from another
scenario and power measurements are not covered. In the open division the accuracy and the latency
bound are the submitter's choice and the compliance tests may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from engine.support.files import file_sha256
from harness.benchmarks import SUBMITTED
from harness.errors import HarnessError
from harness.loadgen.audit import COMPLIANCE_TESTS
from harness.loadgen.log import ACCURACY, DETAIL, SUMMARY, DetailLog, read_complete, read_detail
from harness.loadgen.settings import SCENARIOS
from harness.submission.description import (
    MEASUREMENT_FIELDS,
    STATUSES,
    SYSTEM_FIELDS,
    SYSTEM_TYPES,
)
from harness.submission.findings import (
    Finding,
    folder_files,
    folders,
    json_object,
    log_errors,
    read_log,
    read_text,
    summary_agrees,
    without_folder,
)
from harness.submission.rules import PASS, verify_performance, verify_same_sample
from harness.submission.tree import ACCURACY_LIMIT, ACCURACY_TEXT, DIVISIONS, KEPT, MODEL

TARGET_MAP = 99 * (SUBMITTED.reference_map or 1)
"""Percent: 99 % of the FP32 model's."""
DATASET_IMAGES = 5000
PERFORMANCE_SAMPLES = 64
OFFLINE_SAMPLES = 24_576
MIN_DURATION_MS = 600_000
SERVER_LATENCY_NS = 100_000_000
SEEDS = {
    "qsl_rng_seed": 6655344265603136530,
    "sample_index_rng_seed": 15863379492028895792,
    "schedule_rng_seed": 12662793979680847247,
}
REQUIRED_SCENARIOS = {
    "datacenter": {"Server", "Offline"},
    "edge": {"SingleStream", "MultiStream", "Offline"},
}

_MAP_LINE = re.compile(r"^mAP=(\d{1,2}(?:\.\d+)?|100(?:\.0+)?)%?$", re.MULTILINE)
_HASH_LINE = re.compile(r"^hash=([0-9a-f]{64})$", re.MULTILINE)
_CUT = b"\n\n...\n\n"
"""What stands for the middle of a truncated accuracy log."""
_FIXED: dict[str, dict[str, object]] = {
    "any": {"effective_performance_issue_unique": False, "effective_performance_issue_same": False},
    "Server": {"effective_target_latency_percentile": 0.99},
    "MultiStream": {"effective_samples_per_query": 8},
}
"""Settings of a performance run that count for the result."""

_FLAGS = {
    "TEST01": ("effective_accuracy_log_sampling_target", "logs no answers"),
    "TEST04-A": ("effective_performance_issue_unique", "does not issue unique samples"),
    "TEST04-B": ("effective_performance_issue_same", "does not issue the same sample"),
}


def check_submission(tree: Path) -> list[Finding]:
    """Check every division and submitter of a tree.

    Parameters
    ----------
    tree
        Folder that holds ``open`` or ``closed``.

    Returns
    -------
    list of Finding
        Errors and warnings, by path.

    Raises
    ------
    HarnessError
        When `tree` is no folder, or holds no submitter.
    """
    if not tree.is_dir():
        raise HarnessError(f"{tree} is no folder")
    submitters = [path for division in DIVISIONS for path in folders(tree / division)]
    if not submitters:
        raise HarnessError(f"{tree} holds no open/SUBMITTER or closed/SUBMITTER; is it the tree?")
    findings = [item for submitter in submitters for item in _submitter(submitter)]
    return sorted(findings, key=lambda item: (str(item.path), not item.error, item.message))


def _submitter(root: Path) -> Iterator[Finding]:
    for name in ("systems", "measurements", "results", "code"):
        if not (root / name).is_dir():
            yield Finding(root / name, "the folder is missing")
    systems = folders(root / "results")
    if not systems:
        yield Finding(root / "results", "no system has results")
    for path in sorted((root / "systems").glob("*.json")):
        if path.stem not in {system.name for system in systems}:
            yield Finding(path, "the system has no results", error=False)
    for system in systems:
        yield from _system(root, system)


def _system(root: Path, system: Path) -> Iterator[Finding]:
    closed = root.parent.name == "closed"
    description = yield from _description(root, root / "systems" / f"{system.name}.json")
    models = folders(system)
    if not any(model.name == MODEL for model in models):
        yield Finding(system / MODEL, "the folder is missing")
    for model in models:
        if model.name != MODEL:
            yield Finding(model, f"the model is unknown; only {MODEL} is checked")
            continue
        found = folders(model)
        if not found:
            yield Finding(model, "no scenario has results")
        required: set[str] = set()
        if closed:
            kinds = str(description.get("system_type", "")).split(",")
            required = set().union(*(REQUIRED_SCENARIOS.get(kind, set()) for kind in kinds))
        for name in sorted(required - {path.name for path in found}):
            yield Finding(
                model / name, f"the scenario is required of system type {','.join(kinds)}"
            )
        for scenario in found:
            if scenario.name not in SCENARIOS:
                yield Finding(scenario, f"no scenario; they are {', '.join(SCENARIOS)}")
                continue
            place = scenario.relative_to(root / "results")
            yield from _performance(scenario / "performance" / "run_1", scenario.name, closed)
            yield from _accuracy(scenario / "accuracy", scenario.name, closed)
            yield from _measurements(root, root / "measurements" / place)
            compliance = root / "compliance" / place
            if closed or compliance.exists():
                yield from _compliance(compliance, scenario)


def _description(root: Path, path: Path) -> Generator[Finding, None, dict[str, Any]]:
    values = yield from json_object(path, SYSTEM_FIELDS)
    if not values:
        return {}
    for key in sorted(values.keys() - set(SYSTEM_FIELDS)):
        yield Finding(path, f"field {key!r} is unknown", error=False)
    if str(values.get("submitter", "")).lower() != root.name.lower():
        yield Finding(path, f"submitter is {values.get('submitter')!r}, the folder is {root.name}")
    if values.get("division") != root.parent.name:
        yield Finding(
            path, f"division is {values.get('division')!r}, the folder is {root.parent.name}"
        )
    for key, valid in (("status", STATUSES), ("system_type", SYSTEM_TYPES)):
        if values.get(key, valid[0]) not in valid:
            yield Finding(path, f"{key} is {values[key]!r}, not one of: {', '.join(valid)}")
    return values


def _performance(folder: Path, scenario: str, closed: bool) -> Iterator[Finding]:
    detail = yield from _performance_log(folder, scenario)
    if detail is None:
        return
    path, values = folder / DETAIL, detail.values
    limits = [
        ("performance_sample_count", PERFORMANCE_SAMPLES),
        ("min_duration_ms", MIN_DURATION_MS),
    ]
    if scenario == "Offline":
        limits.append(("samples_per_query", OFFLINE_SAMPLES))
    for key, least in limits:
        yield from _at_least(path, detail, f"effective_{key}", least)
    for key, wanted in _FIXED.get(scenario, {}).items() | _FIXED["any"].items():
        if values.get(key) != wanted:
            yield Finding(path, f"{key} is {values.get(key)}, not {wanted}")
    if values.get("early_stopping_met") is not True and scenario != "Offline":
        yield Finding(path, "early_stopping_met is not true")
    if scenario == "Server":
        bound = values.get("effective_target_latency_ns")
        if not isinstance(bound, int) or bound > SERVER_LATENCY_NS:
            yield Finding(
                path,
                f"effective_target_latency_ns is {bound}; at most {SERVER_LATENCY_NS}",
                error=closed,
            )
    for key, seed in SEEDS.items():
        if values.get(f"effective_{key}") != seed:
            yield Finding(
                path, f"{key} is {values.get(f'effective_{key}')}; v2.0's is {seed}", error=False
            )


def _performance_log(
    folder: Path, scenario: str, *, strict: bool = True
) -> Generator[Finding, None, DetailLog | None]:
    """What any performance run must be; `strict`: also VALID and without errors."""
    complete = yield from folder_files(folder, {SUMMARY, DETAIL}, {ACCURACY})
    if not complete:
        return None
    path = folder / DETAIL
    try:
        detail = read_complete(folder, accuracy=False)
    except HarnessError as error:
        yield Finding(folder, without_folder(error, folder))
        return None
    verdict = detail.values.get("result_validity", "without a verdict")
    if strict:
        yield from log_errors(path, detail)
    if strict and verdict != "VALID":
        yield Finding(path, f"the run is {verdict}")
    yield from _kind(path, detail, scenario, "PerformanceOnly")
    yield from summary_agrees(folder / SUMMARY, detail)
    return detail


def _accuracy(folder: Path, scenario: str, closed: bool) -> Iterator[Finding]:
    complete = yield from folder_files(folder, {SUMMARY, DETAIL, ACCURACY, ACCURACY_TEXT}, set())
    if not complete:
        return
    text = read_text(folder / ACCURACY_TEXT)
    score = _MAP_LINE.search(text)
    if score is None:
        yield Finding(folder / ACCURACY_TEXT, "no line mAP=…%")
    elif float(score[1]) < TARGET_MAP:
        yield Finding(
            folder / ACCURACY_TEXT,
            f"mAP is {score[1]} %; the target is {TARGET_MAP:g} %",
            error=closed,
        )
    yield from _truncated(folder)
    if _CUT not in (folder / ACCURACY).read_bytes():
        yield Finding(folder / ACCURACY, f"both ends of {DATASET_IMAGES} answers are wanted")
    if "encountered" not in read_text(folder / SUMMARY):
        yield Finding(folder / SUMMARY, "the log is cut off")
    path = folder / DETAIL
    detail = yield from read_log(path)
    if detail is None:
        return
    if "power_end" not in detail.values:
        yield Finding(path, "the log is cut off")
    yield from _kind(path, detail, scenario, "AccuracyOnly")
    yield from _at_least(path, detail, "effective_accuracy_sample_count", DATASET_IMAGES)


def _truncated(folder: Path) -> Iterator[Finding]:
    """An accuracy log within the limit, and the hash of the whole one."""
    log, text = folder / ACCURACY, folder / ACCURACY_TEXT
    size = log.stat().st_size
    if size > ACCURACY_LIMIT:
        yield Finding(log, f"{size} bytes; must be truncated to at most {ACCURACY_LIMIT}")
    content = log.read_bytes()
    head, cut, tail = content.partition(_CUT)
    if cut and min(len(head), len(tail)) < KEPT:
        yield Finding(log, f"truncated to less than {KEPT} bytes of each end")
    if not (content.lstrip().startswith(b"[") and content.rstrip().endswith(b"]")):
        yield Finding(log, "lacks the beginning or the end of an accuracy log")
    stated = _HASH_LINE.search(read_text(text))
    if stated is None:
        yield Finding(text, "no line hash=<SHA-256 of the whole accuracy log>")
    elif not cut and file_sha256(log) != stated[1]:
        yield Finding(log, f"not truncated, but its SHA-256 is not the hash in {ACCURACY_TEXT}")


def _measurements(root: Path, folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding(folder, "the folder is missing")
        return
    for name in ("mlperf.conf", "user.conf", "README.md"):
        if not (folder / name).is_file():
            yield Finding(folder / name, "the file is missing")
    system, _, scenario = folder.parts[-3:]
    files = sorted(folder.glob(f"{system}_*.json"))
    if len(files) != 1:
        yield Finding(
            folder, f"{len(files)} files {system}_<implementation>_{scenario}.json, not 1"
        )
        return
    yield from json_object(files[0], MEASUREMENT_FIELDS)
    implementation = files[0].stem.removeprefix(f"{system}_").removesuffix(f"_{scenario}")
    code = root / "code" / MODEL / implementation
    if not code.is_dir() or not any(code.iterdir()):
        yield Finding(code, f"no sources of {files[0].name}")


def _compliance(folder: Path, results: Path) -> Iterator[Finding]:
    for audit in (audit for audits in COMPLIANCE_TESTS.values() for audit in audits):
        test = folder / audit.name
        if not test.is_dir():
            yield Finding(test, "the compliance test is missing")
            continue
        path = test / "performance" / "run_1" / DETAIL
        # TEST04-A ends before LoadGen's minimum, which LoadGen 6 marks as an error
        strict = audit.name != "TEST04-A"
        detail = yield from _performance_log(path.parent, folder.name, strict=strict)
        if audit.name != "TEST04-B":  # whose verdict is in TEST04-A
            yield from _verdict(test / "verify_performance.txt")
        if audit.name == "TEST01":
            yield from _answers(test)
        if detail is None:
            continue
        key, complaint = _FLAGS.get(audit.name, ("", ""))
        if key and not detail.values.get(key):
            yield Finding(path, f"the run {complaint}: {key} is {detail.values.get(key)}")
        yield from _recomputed(path, audit.name, folder, results, detail)
        if audit.name == "TEST05":
            yield from _other_seeds(path, detail, results / "performance" / "run_1" / DETAIL)


def _recomputed(
    path: Path, test: str, folder: Path, results: Path, detail: DetailLog
) -> Iterator[Finding]:
    """The verdict on a test's performance once more, from the logs that lie in the tree."""
    reference = {
        "TEST01": results / "performance" / "run_1",
        "TEST04-B": folder / "TEST04-A" / "performance" / "run_1",
        "TEST05": results / "performance" / "run_1",
    }.get(test)
    if reference is None:
        return
    try:
        base = read_detail(reference / DETAIL)
        if test == "TEST04-B":
            check = verify_same_sample(folder.name, base, detail)
        else:
            check = verify_performance(test, folder.name, base, detail)
    except (HarnessError, KeyError, TypeError, ValueError) as error:
        yield Finding(path, f"cannot be compared with {reference.parent.parent.name}: {error}")
        return
    if not check.passed:
        figures = ", ".join(f"{name} {value:g}" for name, value in check.figures.items())
        yield Finding(path, f"the logs do not pass {test}: {figures}")


def _verdict(path: Path) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(path, "the file is missing")
    elif PASS not in read_text(path).splitlines():
        yield Finding(path, f"no {PASS}")


def _answers(test: Path) -> Iterator[Finding]:
    """TEST01's comparison of answers: the same bytes, or an mAP within 1 %."""
    folder = test / "accuracy"
    verdict = test / "verify_accuracy.txt"
    pair = {"baseline_accuracy.txt", "compliance_accuracy.txt"}
    passed = PASS in read_text(verdict).splitlines()
    if not verdict.is_file():
        yield Finding(verdict, "the file is missing")
    required = {ACCURACY, ACCURACY_TEXT} | (set() if passed else pair)
    complete = yield from folder_files(folder, required, pair)
    if not complete:
        return
    yield from _truncated(folder)
    if passed:
        return
    scores = [_MAP_LINE.search(read_text(folder / name)) for name in sorted(pair)]
    baseline, found = (float(score[1]) if score else 0.0 for score in scores)
    if baseline <= 0 or abs(found - baseline) > 0.01 * baseline:
        yield Finding(
            folder, f"mAP {found} % in performance mode, {baseline} % in the accuracy run"
        )


def _other_seeds(path: Path, detail: DetailLog, reference: Path) -> Iterator[Finding]:
    try:
        base = read_detail(reference).values
    except HarnessError:
        return  # reported with the results
    for key in SEEDS:
        if detail.values.get(f"effective_{key}") == base.get(f"effective_{key}"):
            yield Finding(path, f"{key} is that of the performance run; TEST05 needs another")


def _kind(path: Path, detail: DetailLog, scenario: str, mode: str) -> Iterator[Finding]:
    for key, expected in (("effective_scenario", scenario), ("effective_test_mode", mode)):
        if detail.values.get(key) != expected:
            yield Finding(path, f"{key} is {detail.values.get(key)}, not {expected}")


def _at_least(path: Path, detail: DetailLog, key: str, least: int) -> Iterator[Finding]:
    value = detail.values.get(key)
    if not isinstance(value, int) or value < least:
        yield Finding(path, f"{key} is {value}; at least {least}")

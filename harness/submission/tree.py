"""A submission tree in the layout of MLPerf Inference v2.0, from runs and compliance tests.

``DIVISION/SUBMITTER/{systems,measurements,results,compliance,code}``. The runs' own folders stay as
they are, and with them the accuracy logs, which the tree holds truncated.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.support.documents import read_as
from engine.support.files import file_sha256, whole_folder, write_atomically
from harness.benchmarks import SUBMITTED
from harness.data.dataset import load_map
from harness.errors import HarnessError, as_harness_error
from harness.loadgen.audit import COMPLIANCE_TESTS
from harness.loadgen.log import ACCURACY, DETAIL, SUMMARY
from harness.loadgen.settings import MODES
from harness.loadgen.test import USER_CONF
from harness.results.accuracy import evaluate
from harness.results.result import RESULT, RunResult
from harness.results.run import SAMPLES
from harness.submission.compliance import VERDICT, Base, Verdict
from harness.submission.description import (
    CALIBRATION,
    MAY_BE_EMPTY,
    Description,
    corrections,
    input_dtype,
    measurement_json,
    system_json,
)
from harness.submission.rules import map_line

MODEL = SUBMITTED.detector
"""Name of the model in the tree."""

DIVISIONS = ("open", "closed")
ACCURACY_TEXT = "accuracy.txt"
ACCURACY_LIMIT = 10 * 1024
"""Largest accuracy log in a tree, in bytes."""
KEPT = 4 * 1024
"""Bytes kept of each end of a longer one, as truncate_accuracy_log.py does."""

_SAME = 1e-6  # of two evaluations of one log
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?(?:-dirty)?")


def write_submission(
    bases: Sequence[Base],
    *,
    submitter: str,
    division: str,
    description: Description,
    annotations: Callable[[str], Path],
    output: Path,
) -> tuple[Path, tuple[str, ...]]:
    """Write the tree.

    Parameters
    ----------
    bases
        Runs, each scenario of each system once, performance and accuracy; with the compliance
        tests that were made.
    submitter, division
        Names of the two top folders.
    description
        What the owner says of the system.
    annotations
        From a data set's name to its COCO annotations, by which the accuracy logs are evaluated.
    output
        Folder of the tree.

    Returns
    -------
    Path
        ``output/division/submitter``.
    tuple of str
        One sentence for each thing that the submitter must still see to.

    Raises
    ------
    HarnessError
        Bad names, also of a run's engine or commit, a missing run, a scenario given twice, another
        mAP than that of the accuracy log, or a tree that is there already.
    """
    if division not in DIVISIONS:
        raise HarnessError(f"unknown division {division!r}; choose of: {', '.join(DIVISIONS)}")
    _check_name("submitter", submitter)
    root = output / division / submitter
    if root.exists():
        raise HarnessError(f"{root} exists; remove it or choose another folder")
    _check_bases(bases, division)
    notes: list[str] = []
    try:
        with whole_folder(root) as partial:
            for base in bases:
                _write_scenario(partial, base, description, annotations, notes)
            for base in {_system(base): base for base in bases}.values():
                system = system_json(
                    description,
                    base.run("PerformanceOnly")[1],
                    name=_system(base),
                    submitter=submitter,
                    division=division,
                )
                _write(partial / "systems" / f"{_system(base)}.json", _json(system))
                empty = [key for key, value in system.items() if value == ""]
                _note_empty(notes, f"systems/{_system(base)}.json", empty)
            _write_code(partial / "code" / MODEL, bases, notes)
    except OSError as error:
        raise HarnessError(
            f"{error.filename or root}: cannot write the submission: {error.strerror}"
        ) from error
    return root, tuple(dict.fromkeys(notes))


def truncated(log: bytes) -> bytes:
    """Accuracy log as a tree holds it: both ends of what is longer than `ACCURACY_LIMIT`."""
    if len(log) <= ACCURACY_LIMIT:
        return log
    return log[:KEPT] + b"\n\n...\n\n" + log[-KEPT:]


def _system(base: Base) -> str:
    return base.directory.parent.parent.name


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise HarnessError(
            f"{what} {name!r} is no folder name of letters, digits, '.', '_', '+' and '-'"
        )


def _check_bases(bases: Sequence[Base], division: str) -> None:
    seen: dict[tuple[str, str], Path] = {}
    for base in bases:
        others = [one.benchmark for one in base.results.values() if one.benchmark != MODEL]
        if others:
            raise HarnessError(
                f"{base.directory}: runs of {others[0]}; submission trees are those of MLPerf "
                f"Inference {SUBMITTED.round}, and of {MODEL} alone"
            )
        benchmark = base.directory.parent.name
        if not benchmark.startswith(MODEL):  # the demo's name is longer
            raise HarnessError(f"{base.directory} is no SYSTEM/{MODEL}/SCENARIO folder")
        if benchmark != MODEL and division == "closed":
            raise HarnessError(
                f"{base.directory}: {benchmark} is not the benchmark {MODEL}; its runs go into the "
                "open division alone"
            )
        _check_name("system", _system(base))
        key = (_system(base), base.scenario)
        if key in seen:
            raise HarnessError(f"{base.directory} and {seen[key]}: one run of {base.scenario} each")
        seen[key] = base.directory
        for mode in MODES:
            _check_result(*base.run(mode))
        for name, result in base.results.items():
            if result.lost_devices and result.mode != "AccuracyOnly":
                lost = ", ".join(result.lost_devices)
                raise HarnessError(
                    f"{base.directory / name}: a figure of fewer devices, {lost} lost; run it again"
                )
        directory, accuracy = base.run("AccuracyOnly")
        if accuracy.value is None:
            raise HarnessError(f"{directory} has no mAP; run it with a data set with annotations")


def _check_result(directory: Path, result: RunResult) -> None:
    """Check what names a folder, or goes to git: the file may be anybody's."""
    _check_name(f"{directory / RESULT}: engine.backend", _implementation(result))
    commit = result.commit
    if commit is not None and not _COMMIT.fullmatch(str(commit)):
        raise HarnessError(f"{directory / RESULT}: commit {commit!r} is none of git's")


def _write_scenario(
    root: Path,
    base: Base,
    description: Description,
    annotations: Callable[[str], Path],
    notes: list[str],
) -> None:
    place = Path(_system(base)) / MODEL / base.scenario
    performance_dir, performance = base.run("PerformanceOnly")
    accuracy_dir, accuracy = base.run("AccuracyOnly")
    results = root / "results" / place
    _copy(performance_dir, results / "performance" / "run_1", SUMMARY, DETAIL)
    _copy(accuracy_dir, results / "accuracy", SUMMARY, DETAIL)
    ground_truth = annotations(str(accuracy.dataset["name"]))
    _write_accuracy(
        accuracy_dir, results / "accuracy", _average_precision(accuracy_dir, accuracy, ground_truth)
    )
    if not performance.valid:
        notes.append(f"results/{place}: LoadGen calls the performance run INVALID")
    _write_measurements(root, place, base, description, notes)
    missing = [
        audit.name
        for audits in COMPLIANCE_TESTS.values()
        for audit in audits
        if not _write_compliance(root / "compliance" / place, base, audit.name)
    ]
    if missing:
        notes.append(f"compliance/{place} lacks {', '.join(missing)}; see 'harness compliance'")


def _average_precision(directory: Path, result: RunResult, annotations: Path) -> float:
    """Evaluate a run's accuracy log again, and hold its result against that."""
    found = evaluate(directory / ACCURACY, annotations, load_map(directory / SAMPLES)).mAP
    if result.value is None or abs(found - result.value) > _SAME:
        raise HarnessError(
            f"{directory / RESULT} says mAP {result.value}, and {ACCURACY} gives {found:.6f} with "
            f"{annotations}; run the accuracy test again"
        )
    return found


def _write_accuracy(source: Path, target: Path, value: float | None) -> None:
    """Truncated accuracy log, and accuracy.txt with the mAP and the hash of the whole log."""
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / ACCURACY, truncated((source / ACCURACY).read_bytes()))
    line = "" if value is None else map_line(value)
    _write(target / ACCURACY_TEXT, f"{line}hash={file_sha256(source / ACCURACY)}\n")


def _write_compliance(target: Path, base: Base, name: str) -> bool:
    source = base.directory / name
    if name not in base.results:
        return False
    _copy(source, target / name / "performance" / "run_1", SUMMARY, DETAIL)
    _copy(source, target / name, *(path.name for path in source.glob("verify_*.txt")))
    if name == "TEST01":
        accuracy = target / name / "accuracy"
        _write_accuracy(source, accuracy, None)
        _copy(source, accuracy, *(path.name for path in source.glob("[bc]*_accuracy.txt")))
    return True


def _write_measurements(
    root: Path, place: Path, base: Base, description: Description, notes: list[str]
) -> None:
    directory, result = base.run("PerformanceOnly")
    target = root / "measurements" / place
    _copy(directory, target, USER_CONF)
    loadgen = result.versions.get("loadgen", "unknown")
    _write(
        target / "mlperf.conf",
        f"# LoadGen {loadgen} holds its mlperf.conf inside and reads no such file.\n"
        "# user.conf states every value that the benchmark fixes and LoadGen no longer knows.\n",
    )
    _write(target / "README.md", _readme(base, result))
    _write(target / "calibration_process.md", _calibration(description, result))
    values = measurement_json(description, result)
    name = f"{_system(base)}_{_implementation(result)}_{base.scenario}.json"
    _write(target / name, _json(values))
    empty = [key for key, value in values.items() if not value]
    if input_dtype(result.engine) == "int8" and CALIBRATION not in description.measurements:
        empty.append(f"{CALIBRATION} (the text of calibration_process.md)")
    _note_empty(notes, f"measurements/{place}/{name}", empty)


def _readme(base: Base, result: RunResult) -> str:
    """What was run, and where it departs from the rules of v2.0."""
    engine = "\n".join(
        f"* {key}: {json.dumps(value)}" for key, value in sorted(result.engine.items())
    )
    remarks = [
        f"LoadGen {result.versions.get('loadgen')} is newer than v2.0: its random seeds are those "
        "of its own round, and performance runs use the first samples of the set",
        "the model's v2.0 settings are in user.conf, as this LoadGen does not know the model",
    ]
    for path in sorted(base.directory.glob(f"TEST*/{VERDICT}")):
        with as_harness_error():
            test = read_as(Verdict, path)
        remarks += [f"{test.test}: {remark}" for remark in test.remarks]
    departures = "\n".join(f"* {remark}" for remark in remarks)
    runs = [base.run(mode)[1] for mode in MODES]
    commands = "\n".join(dict.fromkeys(f"    {run.command}" for run in runs))
    return (
        f"# {MODEL}, {base.scenario}, {_system(base)}\n\n"
        f"{commands}\n\n"
        f"with the settings of user.conf, at commit {result.commit or 'unknown'}, "
        f"{result.dataset['samples']} samples.\n\n"
        f"## Engine\n\n{engine}\n\n## Departures from MLPerf Inference v2.0\n\n{departures}\n"
    )


def _calibration(description: Description, result: RunResult) -> str:
    title = "# Calibration\n\n" + corrections(result.engine)
    if CALIBRATION in description.measurements:
        return f"{title}{description.measurements[CALIBRATION]}\n"
    if input_dtype(result.engine) == "int8":
        return f"{title}To be described by the submitter.\n"
    return f"{title}The engine's input is {input_dtype(result.engine) or 'of unknown type'}.\n"


def _write_code(target: Path, bases: Sequence[Base], notes: list[str]) -> None:
    """Each implementation's sources at the commit that ran; where that is unknown, a pointer."""
    commits: dict[str, set[str]] = {}
    for base in bases:
        for mode in MODES:
            result = base.run(mode)[1]
            commits.setdefault(_implementation(result), set()).add(result.commit or "unknown")
    for implementation, names in commits.items():
        folder = target / implementation
        name = ", ".join(sorted(names))
        archive = _archive(name) if len(names) == 1 else None
        if archive is None:
            notes.append(f"code/{MODEL}/{implementation} lacks the sources of commit {name}")
            _write(folder / "README.md", f"Sources: ssd-resnet34-trt at commit {name}.\n")
            continue
        folder.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")


def _archive(commit: str) -> bytes | None:
    """Tar of the sources at a commit, without the demo's images; None if this is no checkout."""
    here = Path(__file__).resolve().parents[2]
    command = ["git", "archive", "--format=tar", commit, ":(exclude)demo/data"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _implementation(result: RunResult) -> str:
    return str(result.engine.get("backend", ""))


def _note_empty(notes: list[str], where: str, fields: Sequence[str]) -> None:
    required = [name for name in fields if name not in MAY_BE_EMPTY]
    if required:
        notes.append(f"{where}: empty, to be filled in through --system: {', '.join(required)}")


def _copy(source: Path, target: Path, *names: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"

"""Compliance tests: audited runs with the settings of a base run, and their verdicts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.protocol import first_label
from engine.support.documents import checked
from engine.support.files import write_atomically
from engine.support.progress import Progress
from harness.data.dataset import load_map
from harness.errors import HarnessError, as_harness_error
from harness.loadgen.audit import COMPLIANCE_TESTS, SAMPLING_TARGET
from harness.loadgen.log import ACCURACY, DETAIL, DetailLog, read_detail
from harness.loadgen.settings import MODES, SCENARIOS, Settings
from harness.results.report import find_results
from harness.results.result import RESULT, RunResult, engine_difference
from harness.results.run import SAMPLES, Benchmark, run
from harness.submission.rules import (
    Check,
    score,
    verify_accuracy,
    verify_performance,
    verify_same_sample,
)

VERDICT = "compliance.json"

_REMARKS = {
    "TEST04": (
        "TEST04-A ends after the unique samples in memory, which LoadGen 6 calls INVALID for too "
        "few queries or too short a time; the test compares the scores whatever LoadGen says"
    ),
    "TEST05": (
        "LoadGen 6 takes no seeds from an audit.config: these are the TEST05 seeds embedded in it, "
        "not those of v2.0; in performance mode it uses the first samples whatever the seed, so "
        "the seeds change their order and the schedule alone"
    ),
}


@dataclass(frozen=True)
class Base:
    """The runs of one scenario that a submission is about.

    Attributes
    ----------
    directory
        Folder of the scenario, ``SYSTEM/ssd-resnet34/SCENARIO``; the audited runs lie in it, too.
    results
        Mode, or name of the audited run, to its result.
    """

    directory: Path
    results: Mapping[str, RunResult]

    @property
    def scenario(self) -> str:
        """LoadGen's name of the scenario."""
        return next(iter(self.results.values())).scenario

    def run(self, mode: str) -> tuple[Path, RunResult]:
        """Folder and result of a run.

        Raises
        ------
        HarnessError
            When there is none.
        """
        if mode not in self.results:
            raise HarnessError(
                f"{self.directory} holds no {mode} run; make it with 'harness run --test_mode "
                f"{','.join(MODES)}' first"
            )
        return self.directory / mode, self.results[mode]


@dataclass(frozen=True)
class Verdict:
    """Outcome of a compliance test in one scenario.

    Attributes
    ----------
    test, scenario
        What was tested.
    passed
        Whether every check passed.
    files
        Verdict files, ``verify_performance.txt`` among them.
    figures
        What was compared, by name.
    remarks
        Sentences on where this departs from MLPerf Inference v2.0, and what a reader must know.
    """

    test: str
    scenario: str
    passed: bool
    files: tuple[Path, ...]
    figures: Mapping[str, float]
    remarks: tuple[str, ...]


def find_bases(directories: Sequence[Path]) -> list[Base]:
    """Runs in or below these folders, put together by scenario folder.

    Raises
    ------
    HarnessError
        When a folder holds none, or its name is not the one that ``harness run`` gave it.
    """
    grouped: dict[Path, dict[str, RunResult]] = {}
    for path, result in find_results(directories):
        folder = path.resolve()
        if folder.name != result.mode or folder.parent.name != result.scenario:
            raise HarnessError(
                f"{path}: a {result.scenario} {result.mode} run lies in "
                f"{result.scenario}/{result.mode}; was it moved?"
            )
        grouped.setdefault(folder.parent, {})[result.mode] = result
    return [Base(directory, results) for directory, results in grouped.items()]


def check_compliance(
    benchmark: Benchmark,
    base: Base,
    test: str,
    *,
    samples: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Run a compliance test with the settings of the base run, and write its verdict.

    The audited runs and the verdict files lie beside the base runs, in ``TEST01``, ``TEST04-A``,
    ``TEST04-B`` or ``TEST05``.

    Parameters
    ----------
    benchmark
        Engine and data, the same as in the base runs.
    base
        The performance run, for TEST01 with the accuracy run.
    test
        A key of `COMPLIANCE_TESTS`.
    samples
        Samples in memory, for TEST04 alone; None: as in the base run. More make TEST04-A longer,
        which its README allows.
    progress
        Called about once a second during a run.

    Raises
    ------
    HarnessError
        When the engine, the samples or the test are not those of the base runs, or an audited run
        of that name is there already.
    RunFailedError
        See `harness.results.run.run`.
    """
    reference_dir, reference = base.run("PerformanceOnly")
    needed = [reference_dir]
    if test == "TEST01":
        needed.append(base.run("AccuracyOnly")[0])
    if samples is not None and test != "TEST04":
        raise HarnessError(f"{test} runs with the samples of the base run; leave out --samples")
    for directory in needed:
        _check_same(benchmark, directory, base.results[directory.name])
        _check_whole(directory, base.results[directory.name])
    settings = _settings(reference_dir, reference)
    if samples is not None:
        settings = dataclasses.replace(settings, performance_sample_count=samples)
    audits = COMPLIANCE_TESTS[test]
    directories = [base.directory / audit.name for audit in audits]
    for directory in directories:
        if directory.exists():
            raise HarnessError(f"{directory} exists; remove it to run the test again")
    details = []
    for audit, directory in zip(audits, directories, strict=True):
        audited = run(benchmark, settings, "PerformanceOnly", directory, progress, audit=audit)
        _check_whole(directory, audited)
        details.append(read_detail(directory / DETAIL))
    base_detail = read_detail(reference_dir / DETAIL)
    if test == "TEST04":
        checks = [verify_same_sample(base.scenario, *details)]
    else:
        checks = [verify_performance(test, base.scenario, base_detail, *details)]
    if test == "TEST01":
        dataset = benchmark.dataset
        checks.append(
            verify_accuracy(
                base.directory / "AccuracyOnly" / ACCURACY,
                directories[0] / ACCURACY,
                dataset.annotations if dataset else None,
                benchmark.source.files,
                first_label(benchmark.manifest),
            )
        )
    remarks = _remarks(test, base, base_detail, details, checks)
    return _written(test, base.scenario, checks, remarks, directories[0])


def _check_same(benchmark: Benchmark, directory: Path, result: RunResult) -> None:
    """A compliance test says something only about the engine and the samples that were run."""
    if (different := engine_difference(result.engine, benchmark.manifest)) is not None:
        raise HarnessError(f"{directory} was run on another engine: {different}")
    if load_map(directory / SAMPLES) != tuple(benchmark.source.files):
        raise HarnessError(
            f"{directory} was run on other samples than the preprocessed set holds; see {SAMPLES}"
        )


def _check_whole(directory: Path, result: RunResult) -> None:
    """A run that lost devices is compared with nothing: its figure is of fewer."""
    if result.lost_devices:
        raise HarnessError(
            f"{directory}: {', '.join(result.lost_devices)} lost in it; remove it and run it again"
        )


def _settings(directory: Path, result: RunResult) -> Settings:
    """The settings of a run, with what its warm-up estimated."""
    kind = SCENARIOS[result.scenario]
    names = [item.name for item in dataclasses.fields(kind)]
    found = {name: result.settings[name] for name in names if name in result.settings}
    with as_harness_error():
        return checked(kind, found, f"{directory / RESULT}: settings.")


def _remarks(
    test: str,
    base: Base,
    reference: DetailLog,
    details: Sequence[DetailLog],
    checks: Sequence[Check],
) -> tuple[str, ...]:
    remarks = [_REMARKS[test]] if test in _REMARKS else []
    if test == "TEST04":
        remarks += _same_sample_remarks(base.scenario, reference, *details)
    if test == "TEST01":
        figures = checks[-1].figures
        answers, different = int(figures["answers"]), int(figures["different"])
        if answers < SAMPLING_TARGET / 2:
            remarks.append(f"{answers} answers were logged; the test aims at {SAMPLING_TARGET}")
        if different and checks[-1].passed:
            remarks.append(
                f"{different} of {answers} answers are not the same bytes, but the mAP agrees "
                "within 1 %"
            )
    for name, detail in zip(COMPLIANCE_TESTS[test], details, strict=True):
        remarks += [f"{name.name}: {text}" for text in detail.complaints if name.name != "TEST04-A"]
    return tuple(remarks)


def _same_sample_remarks(
    scenario: str, reference: DetailLog, unique: DetailLog, same: DetailLog
) -> list[str]:
    ratio = score(same, scenario) / score(reference, scenario)
    remarks = [
        f"TEST04-B's score is {ratio:.3f} of the base run's, which is what v2.1 and later compare"
    ]
    if scenario == "Server":
        target = float(unique.values["effective_target_qps"])
        remarks.append(
            f"TEST04-A's random arrivals came to {score(unique, scenario) / target:.3f} of the "
            "target rate, as they are few, and v2.0 compares these rates; --samples makes them more"
        )
    return remarks


def _written(
    test: str, scenario: str, checks: Sequence[Check], remarks: tuple[str, ...], directory: Path
) -> Verdict:
    figures: dict[str, float] = {}
    files = []
    for check in checks:
        figures |= check.figures
        for name, text in check.files.items():
            write_atomically(directory / name, text.encode())
            files.append(directory / name)
    passed = all(check.passed for check in checks)
    verdict = Verdict(test, scenario, passed, tuple(files), figures, remarks)
    document = {**dataclasses.asdict(verdict), "files": [path.name for path in files]}
    write_atomically(directory / VERDICT, (json.dumps(document, indent=2) + "\n").encode())
    return verdict

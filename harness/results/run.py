"""A benchmark run: LoadGen tests, evaluation, pictures and result.json, in one folder per test."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.protocol import Engine, first_label
from engine.support.environment import command_line, commit, now
from engine.support.files import write_atomically
from engine.support.progress import Progress
from harness.benchmarks import DEFAULT
from harness.data.dataset import Dataset, category_names, load_map
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.audit import Audit
from harness.loadgen.log import ACCURACY
from harness.loadgen.qsl import SampleSource
from harness.loadgen.response import ANY_LABEL
from harness.loadgen.settings import Mode, MultiStream, Settings, SingleStream
from harness.loadgen.test import Outcome, run_test
from harness.lock import locked
from harness.results.accuracy import Evaluation, accuracy_of, evaluation_of
from harness.results.latencies import summarized
from harness.results.pictures import draw_detections
from harness.results.result import RunResult, latency_summary, performance_figures, versions

PICTURES = "pictures"

SAMPLES = "samples.txt"
"""Map file of a run: the image of each sample, which is not the data set's where some were bad."""
ERROR = "error.txt"


@dataclass(frozen=True)
class Benchmark:
    """What all tests of a run share.

    Attributes
    ----------
    engines
        The engine under test, on every device.
    source
        Preprocessed images that fit the engine.
    dataset
        Where the images and annotations are; None: accuracy runs are not evaluated.
    timeout_s
        Longest time in seconds that the engine may take for one batch.
    pictures
        Number of images on which an accuracy run draws its detections.
    warnings
        What speaks against the data before anything runs.
    detector
        Name of the network, see `harness.benchmarks.Description`.

    Raises
    ------
    HarnessError
        When the engines are not one and the same.
    """

    engines: tuple[Engine, ...]
    source: SampleSource
    dataset: Dataset | None
    timeout_s: float
    pictures: int = 0
    warnings: tuple[str, ...] = ()
    detector: str = DEFAULT.detector

    def __post_init__(self) -> None:
        """Check that the engines may stand for each other."""
        first, *others = self.engines
        for other in others:
            if other.input_spec != first.input_spec:
                raise HarnessError(
                    f"the engines take different images: {first.input_spec}, {other.input_spec}"
                )
            hashes = [engine.manifest.get("onnx_sha256") for engine in (first, other)]
            if hashes[0] != hashes[1]:
                raise HarnessError(
                    f"the engines come from different models: SHA-256 {hashes[0]}, {hashes[1]}"
                )

    @functools.cached_property
    def labels(self) -> range:
        """Those that a detection may have: the categories of the annotations, where there are."""
        annotations = self.dataset.annotations if self.dataset else None
        first = first_label(self.engines[0].manifest)
        if annotations is None or not annotations.exists():
            return range(first, ANY_LABEL.stop)
        return range(first, first + len(category_names(annotations)))

    @property
    def manifest(self) -> dict[str, object]:
        """The first engine's manifest, with the ``devices`` of all instead of its ``device``.

        Of GPUs, ``gpus`` has what identifies each and, as its ``manifest``, what that of its engine
        says otherwise than the first one's.
        """
        manifests = [dict(engine.manifest) for engine in self.engines]
        devices = [manifest.pop("device", None) for manifest in manifests]
        gpus = [manifest.pop("running_on", None) for manifest in manifests]
        first = manifests[0]
        described = [
            {**gpu, "manifest": {k: v for k, v in own.items() if k not in first or first[k] != v}}
            for gpu, own in zip(gpus, manifests, strict=True)
            if isinstance(gpu, Mapping)
        ]
        return {**first, "devices": devices, **({"gpus": described} if described else {})}


def run(
    benchmark: Benchmark,
    settings: Settings,
    mode: Mode,
    directory: Path,
    progress: Progress | None = None,
    *,
    audit: Audit | None = None,
    evaluated: Callable[[Evaluation], None] | None = None,
) -> RunResult:
    """Run one test and leave its logs and result.json.

    All is written to ``<directory>.partial``, which gets its name only when it is complete. After
    a failure it stays, with the traceback in `ERROR`. Meanwhile no other run writes into the folder
    that it lies in, a scenario's.

    Parameters
    ----------
    benchmark
        Engine and data.
    settings, mode
        The test.
    directory
        Folder to be made.
    progress
        Called about once a second during the test.
    audit
        Compliance test that a performance run belongs to; its name becomes the result's mode.
    evaluated
        Takes the evaluation of an accuracy run, which for COCO takes up to a minute.

    Raises
    ------
    HarnessError
        When `directory` exists, another run is writing beside it or it cannot be written, or the
        logs are not complete.
    RunFailedError
        When the engine fails, does not answer in time, or the user interrupts.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        with locked(directory.parent, otherwise="choose another log directory"):
            if directory.exists():
                raise HarnessError(f"{directory} exists; choose another log directory or remove it")
            with _error_kept(partial):
                result = _run(
                    benchmark,
                    settings,
                    mode,
                    partial,
                    progress=progress,
                    audit=audit,
                    evaluated=evaluated,
                )
            partial.rename(directory)
    except OSError as error:
        raise HarnessError(
            f"cannot write the run's files to {partial}: {error.strerror}"
        ) from error
    except RunFailedError as error:
        raise RunFailedError(
            f"{settings.scenario} {audit.name if audit else mode}: {error}; "
            f"its unfinished logs: {partial}",
            error.exit_code,
        ) from error
    return result


def _run(
    benchmark: Benchmark,
    settings: Settings,
    mode: Mode,
    directory: Path,
    *,
    progress: Progress | None,
    audit: Audit | None,
    evaluated: Callable[[Evaluation], None] | None,
) -> RunResult:
    """Run one test, and leave its logs and result.json in a folder, which is emptied before."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    samples = "".join(f"{name}\n" for name in benchmark.source.files)
    write_atomically(directory / SAMPLES, samples.encode())
    outcome = run_test(
        benchmark.engines,
        benchmark.source,
        settings,
        mode,
        directory,
        timeout_s=benchmark.timeout_s,
        progress=progress,
        audit=audit,
        labels=benchmark.labels,
        detector=benchmark.detector,
    )
    if mode == "PerformanceOnly":
        summarized(outcome.latencies).write(directory)
    result = _result(benchmark, settings, outcome, mode, directory, evaluated)
    if audit is not None:
        result = dataclasses.replace(result, mode=audit.name)
    result.write(directory)
    return result


@contextlib.contextmanager
def _error_kept(partial: Path) -> Iterator[None]:
    """Leave the traceback of a failure in the folder of a run."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            if isinstance(error, RunFailedError):
                # LoadGen may have filled it with the empty answers that ended the run
                (partial / ACCURACY).unlink(missing_ok=True)
            write_atomically(partial / ERROR, "".join(traceback.format_exception(error)).encode())
        raise


def _result(  # noqa: PLR0917
    benchmark: Benchmark,
    asked: Settings,
    outcome: Outcome,
    mode: Mode,
    directory: Path,
    evaluated: Callable[[Evaluation], None] | None,
) -> RunResult:
    detail = outcome.detail
    lost = outcome.lost_devices
    if mode == "AccuracyOnly":
        figures = _accuracy_figures(benchmark, outcome, directory, evaluated)
    else:
        figures = performance_figures(outcome)
    dataset = benchmark.dataset
    return RunResult(
        **{
            "benchmark": benchmark.detector,
            "scenario": outcome.settings.scenario,
            "mode": mode,
            "valid": detail.valid if detail.valid is None else detail.valid and not lost,
            "samples_per_second": None,
            "latency_ms": {} if mode == "AccuracyOnly" else detail.latency_ms,
            "batch_latency_ms": latency_summary(outcome.batch_seconds),
            "errors": (*detail.complaints, *_fewer(benchmark, lost, mode)),
            "warnings": (
                *_skipped(benchmark),
                *_standing_by(benchmark, asked, mode),
                *outcome.losses,
            ),
            "accuracy": None,
            "pictures": None,
            "dataset": {
                "name": dataset.name if dataset else None,
                "samples": len(benchmark.source.files),
            },
            "engine": benchmark.manifest,
            "settings": {
                **dataclasses.asdict(outcome.settings),
                "timeout_s": benchmark.timeout_s,
                "loadgen": detail.effective,
            },
            "versions": versions(str(detail.values.get("loadgen_version"))),
            "command": command_line(),
            "commit": commit(),
            "finished": now(),
            "lost_devices": lost,
            "asked": dataclasses.asdict(asked),
            **figures,
        }
    )


def _standing_by(benchmark: Benchmark, settings: Settings, mode: Mode) -> tuple[str, ...]:
    """Say of a figure with one query at a time that the devices did not share its work."""
    alone = isinstance(settings, SingleStream | MultiStream)
    if len(benchmark.engines) == 1 or not alone or mode == "AccuracyOnly":
        return ()
    return (
        f"{settings.scenario} has one query at a time: the first device that was not lost answered "
        f"all, {len(benchmark.engines) - 1} stood by",
    )


def _fewer(benchmark: Benchmark, lost: Sequence[str], mode: Mode) -> tuple[str, ...]:
    """Say of a performance run that its figure is not one of all its devices."""
    if not lost or mode == "AccuracyOnly":
        return ()
    count = len(benchmark.engines)
    return (
        f"{', '.join(lost)} lost: a figure of {count - len(lost)} of {count} devices, which does "
        "not count, whatever LoadGen says",
    )


def _accuracy_figures(
    benchmark: Benchmark,
    outcome: Outcome,
    directory: Path,
    evaluated: Callable[[Evaluation], None] | None,
) -> dict[str, Any]:
    figures: dict[str, Any] = {"metric": "mAP", "value": None}
    dataset = benchmark.dataset
    if dataset is None or dataset.annotations is None:
        return figures
    files = benchmark.source.files
    found = evaluation_of(
        directory / ACCURACY,
        dataset.annotations,
        files,
        first_label(benchmark.engines[0].manifest),
    )
    accuracy = accuracy_of(found)
    if evaluated is not None:
        evaluated(found)
    figures["value"] = accuracy.mAP
    figures["accuracy"] = dataclasses.asdict(accuracy)
    warnings = (*_skipped(benchmark), *outcome.losses, *benchmark.warnings, *accuracy.warnings)
    figures["warnings"] = tuple(dict.fromkeys(warnings))
    if benchmark.pictures:
        draw_detections(
            dataset.image_dir,
            files,
            found.log.rows,
            category_names(dataset.annotations),
            directory / PICTURES,
            limit=benchmark.pictures,
            annotations=dataset.annotations,
        )
        figures["pictures"] = PICTURES
    return figures


def _skipped(benchmark: Benchmark) -> tuple[str, ...]:
    """Say so when the preprocessed set lacks images of the map."""
    if benchmark.dataset is None:
        return ()
    expected, present = len(load_map(benchmark.dataset.map_file)), len(benchmark.source.files)
    if expected == present:
        return ()
    return (f"the preprocessed set holds {present} of the {expected} images of the map",)

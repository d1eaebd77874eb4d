"""result.json: everything one run is reported from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from engine.support.documents import read_as
from engine.support.environment import cpu_count, cpu_name
from engine.support.files import write_atomically
from harness.errors import HarnessError, as_harness_error
from harness.loadgen.settings import SCENARIOS
from harness.loadgen.test import Outcome

RESULT = "result.json"

_NOT_OURS = "it is not a result of 'harness run'"

_METRICS = {
    "Offline": ("samples per second", "result_samples_per_second", 1.0),
    "Server": ("completed samples per second", "result_completed_samples_per_sec", 1.0),
    "SingleStream": ("90th percentile latency (ms)", "result_90.00_percentile_latency_ns", 1e-6),
    "MultiStream": (
        "99th percentile latency (ms)",
        "result_99.00_percentile_per_query_latency_ns",
        1e-6,
    ),
}
"""Scenario to metric name, key in the detail log, and factor."""


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes
    ----------
    benchmark
        LoadGen's name of the benchmark.
    scenario, mode
        The LoadGen test.
    metric, value
        Name and value of the figure that counts: samples per second, a latency in milliseconds, or
        mAP (0..1) in an accuracy run. The value is None when no annotations were given.
    valid
        Whether LoadGen calls a performance run VALID and no device was lost in it; None in an
        accuracy run.
    samples_per_second
        Throughput of a performance run.
    latency_ms
        LoadGen's query latencies: min, mean, max, p50, p90, p95, p97, p99, p99.9, in milliseconds.
    batch_latency_ms
        The same of single batches in the engine.
    errors
        LoadGen's errors, what an INVALID run missed, and that a figure is of fewer devices.
    warnings
        What a reader of the accuracy must know, and the sessions that were lost.
    accuracy
        Result of the evaluation of an accuracy run.
    pictures
        Folder of the pictures of detections, relative to the run's folder.
    dataset
        Name and number of the samples.
    engine
        The engine's manifest, and the ``devices`` it ran on; of GPUs under ``gpus`` index, name,
        UUID, PCI address, and what the manifest of the engine there says otherwise.
    settings
        Ours, and those that LoadGen reports as effective.
    versions
        Of the software and the machine.
    command
        What the user ran.
    commit
        Git commit of the project when it runs from a checkout, with ``-dirty`` when changed.
    finished
        End of the run, ISO 8601, UTC.
    lost_devices
        Devices that the run ended without, GPUs with their UUID: its figure is of the others.
    asked
        The settings before a warm-up or an engine changed them; empty in results from before.
    """

    benchmark: str
    scenario: str
    mode: str
    metric: str
    value: float | None
    valid: bool | None
    samples_per_second: float | None
    latency_ms: Mapping[str, float]
    batch_latency_ms: Mapping[str, float]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    accuracy: Mapping[str, Any] | None
    pictures: str | None
    dataset: Mapping[str, Any]
    engine: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    commit: str | None
    finished: str
    lost_devices: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write the file into the folder of a run."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(directory / RESULT, text.encode())


def read_result(path: Path) -> RunResult:
    """Read a result.json.

    Raises
    ------
    HarnessError
        When it cannot be read, is none of ours, or tells the figure that counts in two ways.
    """
    with as_harness_error():
        result = read_as(RunResult, path, _NOT_OURS)
    if result.scenario not in SCENARIOS:
        raise HarnessError(f"{path}: scenario {result.scenario!r} is unknown; {_NOT_OURS}")
    name, figure = "value", result.value
    if result.mode == "AccuracyOnly":
        name, figure = "accuracy.mAP", (result.accuracy or {}).get("mAP")
    elif result.scenario in ("Offline", "Server"):
        name, figure = "samples_per_second", result.samples_per_second
    if figure != result.value:
        raise HarnessError(f"{path}: value is {result.value}, but {name} {figure}; {_NOT_OURS}")
    return result


_SINCE = ("keep_top_k", "outputs")
"""What manifests did not say before 0.2."""

_PREPARED = ("max_batch", "batch_sizes", "kernels")
"""What cuDNN makes ready for the scenarios of a command; a plan of other sizes is another file."""

_PLACES = ("gpus",)
"""Which GPUs of their model they were; their number and model are compared."""


def engine_difference(then: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    """What makes an engine another one than that of a result, as ``key was A and is B now``."""
    now: dict[str, Any] = json.loads(json.dumps(manifest))
    # labels were taken so, right or not, by results that do not say it
    then, now = {"first_label": 1, **then}, {"first_label": 1, **now}
    unsaid = {key for key in _SINCE if key not in then}
    for key in {**then, **now}:
        known = key in {*unsaid, *_PREPARED, *_PLACES}
        if not known and then.get(key) != now.get(key):
            return f"{key} was {then.get(key)!r} and is {now.get(key)!r} now"
    return None


def performance_figures(outcome: Outcome) -> dict[str, Any]:
    """Fields of `RunResult` that a performance run's logs give."""
    values = outcome.detail.values
    scenario = outcome.settings.scenario
    metric, key, factor = _METRICS[scenario]
    value = values[key] * factor
    if scenario == "SingleStream":
        throughput = values["result_qps_with_loadgen_overhead"]
    elif scenario == "MultiStream":
        throughput = outcome.settings.batch / (values["result_mean_query_latency_ns"] * 1e-9)
    else:
        throughput = value
    return {"metric": metric, "value": value, "samples_per_second": throughput}


def latency_summary(seconds: tuple[float, ...]) -> dict[str, float]:
    """Min, mean, max and percentiles of durations (seconds), in milliseconds."""
    if not seconds:
        return {}
    ms = np.array(seconds) * 1000
    summary = {"min": ms.min(), "mean": ms.mean(), "max": ms.max()}
    for percent in (50, 90, 95, 97, 99, 99.9):
        # the inverted CDF is what LoadGen reports: a value that occurred
        summary[f"p{percent:g}"] = np.percentile(ms, percent, method="inverted_cdf")
    return {name: round(float(value), 6) for name, value in summary.items()}


def versions(loadgen: str) -> dict[str, str]:
    """Versions of the software, and the machine."""
    try:
        project = metadata.version("ssd-resnet34-trt")
    except metadata.PackageNotFoundError:
        project = "not installed"
    return {
        "project": project,
        "loadgen": loadgen,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": str(cpu_count()),
    }

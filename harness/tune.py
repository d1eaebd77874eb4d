"""Measure how a benchmark runs best on this machine, by short LoadGen runs."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.environment import cpu_count, cpu_name, gpu_name, now
from engine.files import write_atomically
from engine.load import FROM_ONNX, load_engine
from engine.preprocessed import PreprocessedSet
from engine.progress import progress_bar
from engine.protocol import Engine
from harness.errors import HarnessError
from harness.loadgen import Outcome, run_test
from harness.route import Route, build_engine, build_int8, float_type
from harness.settings import MODEL, Offline, Server, Settings
from harness.system_config import CONFIGS, DEFAULT_VERSION, named_configs
from harness.targets import TIMEOUT_S, val_images

SERVER_QUERIES = 1000
"""Queries of a Server trial at least: early stopping asks 459 to 1,000 for up to two late ones."""

PRECISION = 0.05
"""Relative width at which the search for the arrival rate ends."""

_LOWEST = 1 / 32  # of the throughput; a lower arrival rate is not looked for
_WORSE_IN_A_ROW = 2  # larger batches without a gain, after which no larger one is tried


@dataclass(frozen=True)
class Tuning:
    """What to tune.

    Attributes
    ----------
    engine, device
        See `engine.load.load_engine`.
    max_batch
        Largest batch to try.
    seconds
        Length of a trial run.
    """

    engine: str
    device: str
    max_batch: int
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """The best settings.

    Attributes
    ----------
    threads
        CPU threads; None: not tuned, as on a GPU.
    offline_batch, offline_qps
        Batch of the highest throughput, and that throughput, in samples per second.
    server_batch, server_qps
        Batch of the Server trials and the highest VALID arrival rate; None: no rate was valid.
    """

    threads: int | None
    offline_batch: int
    offline_qps: float
    server_batch: int | None
    server_qps: float | None


def tune(route: Route, tuning: Tuning) -> Tuned:
    """Search the best settings, one trial after the other.

    Raises
    ------
    HarnessError, EngineError
        When an artefact cannot be made, or an engine or LoadGen refuses it.
    RunFailedError
        When a trial fails.
    """
    model = build_int8(route, float_type(tuning.engine))
    images = val_images(route, model)
    onnx = tuning.engine in FROM_ONNX

    def engine(batch: int, threads: int | None) -> Engine:
        file = model if onnx else build_engine(route, model, tuning.engine, batch)
        return load_engine(tuning.engine, file, device=tuning.device, threads=threads)

    return search(
        engine,
        images,
        tuning,
        cpu_count() if onnx and tuning.device == "cpu" else None,
        route.say,
    )


def search(
    engine: Callable[[int, int | None], Engine],
    images: PreprocessedSet,
    tuning: Tuning,
    threads: int | None,
    say: Callable[[str], None],
) -> Tuned:
    """Search with given engines.

    Parameters
    ----------
    engine
        Loads the engine for a batch and a number of threads.
    images
        What it shall detect objects in.
    tuning
        What to tune.
    threads
        Most threads to try; None: leave the number to the engine.
    say
        Takes one line for each trial.
    """
    milliseconds = max(1, round(1000 * tuning.seconds))

    def offline(batch: int, threads: int | None) -> float:
        settings = Offline(min_duration_ms=milliseconds, min_query_count=1, batch_size=batch)
        outcome = _trial(engine(batch, threads), images, settings)
        found = float(outcome.detail.values["result_samples_per_second"])
        say(f"Offline, batch {batch}{_threads(threads)}: {found:.2f} samples/s")
        return found

    by_batch = climb(lambda batch: offline(batch, threads), tuning.max_batch)
    batch = max(by_batch, key=lambda size: by_batch[size])
    by_threads = {threads: by_batch[batch]}
    fewer = (threads or 1) // 2
    while fewer >= 1:
        by_threads[fewer] = offline(batch, fewer)
        fewer //= 2
    best = max(by_threads, key=lambda count: by_threads[count])

    # half of the bound is for the engine, the other half for waiting
    bound = Server().target_latency_ms / 1000
    fitting = [size for size in by_batch if size / by_batch[size] <= bound / 2]
    server_batch = max(fitting, key=lambda size: by_batch[size], default=1)
    loaded = engine(server_batch, best)

    def valid(qps: float) -> bool:
        settings = Server(
            min_duration_ms=milliseconds,
            min_query_count=SERVER_QUERIES,
            target_qps=qps,
            batch_size=server_batch,
        )
        detail = _trial(loaded, images, settings).detail
        say(
            f"Server, batch {server_batch}{_threads(best)}, {qps:.2f} queries/s: p99 "
            f"{detail.latency_ms['p99']:.1f} ms, {'VALID' if detail.valid else 'INVALID'}"
        )
        return bool(detail.valid)

    server_qps = None
    if 1 / by_batch[1] < bound:
        server_qps = highest_valid(valid, by_batch[server_batch])
    if server_qps is None:
        say(f"Server: no arrival rate was valid within {1000 * bound:g} ms")
        return Tuned(best, batch, by_threads[best], None, None)
    return Tuned(best, batch, by_threads[best], server_batch, server_qps)


def climb(measure: Callable[[int], float], largest: int) -> dict[int, float]:
    """Measure sizes 1, 2, 4, … until larger ones gain nothing, or the largest.

    Returns
    -------
    dict
        Size to what was measured.
    """
    found: dict[int, float] = {}
    size = 1
    while size <= largest:
        found[size] = measure(size)
        best = max(found, key=lambda tried: found[tried])
        if sum(tried > best for tried in found) >= _WORSE_IN_A_ROW:
            break
        size *= 2
    return found


def highest_valid(valid: Callable[[float], bool], ceiling: float) -> float | None:
    """Find the highest value below a ceiling that is valid, by bisection to `PRECISION`.

    Returns
    -------
    float or None
        A value that was found valid; None when even 1/32 of the ceiling is not.
    """
    low, high = 0.0, ceiling
    while high - low > PRECISION * high and high > _LOWEST * ceiling:
        middle = (low + high) / 2
        if valid(middle):
            low = middle
        else:
            high = middle
    return low or None


def config_path(benchmark: str, device: str) -> Path:
    """File in `CONFIGS` for this machine and a benchmark: that which names it, or a new one.

    Raises
    ------
    HarnessError
        When the device is a GPU and this machine names none.
    """
    key, name = _machine(device)
    named = named_configs(benchmark, key, name)
    if named:
        return named[0]
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return CONFIGS / f"{stem}{benchmark.removeprefix(MODEL)}.toml"


def _machine(device: str) -> tuple[str, str]:
    """Key and name of what a configuration is found by."""
    if not device.startswith("cuda"):
        return "cpu", cpu_name()
    name = gpu_name()
    if name is None:
        raise HarnessError(f"--device {device}: this machine names no GPU")
    return "gpu", name


def config_text(benchmark: str, tuning: Tuning, found: Tuned) -> str:
    """Content of the configuration file, see `harness.system_config`."""
    key, name = _machine(tuning.device)
    lines = [
        f"# Measured by `harness tune` on {now()}, trials of {tuning.seconds:g} s.",
        "[system]",
        f"benchmark = {json.dumps(benchmark)}",
        f"{key} = {json.dumps(name)}",
        "",
        f"[{DEFAULT_VERSION}]",
        f"engine = {json.dumps(tuning.engine)}",
        f"device = {json.dumps(tuning.device)}",
        *([f"threads = {found.threads}"] if found.threads else []),
        "",
        f"[{DEFAULT_VERSION}.Offline]",
        f"batch_size = {found.offline_batch}",
        f"target_qps = {found.offline_qps:.3f}",
    ]
    if found.server_qps is not None:
        lines += [
            "",
            f"[{DEFAULT_VERSION}.Server]",
            f"batch_size = {found.server_batch}",
            f"target_qps = {found.server_qps:.3f}",
        ]
    return "\n".join(lines) + "\n"


def write_config(path: Path, text: str) -> None:
    """Write the configuration file.

    Raises
    ------
    HarnessError
        When it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise HarnessError(f"{path}: cannot write it: {error.strerror}") from error


def _trial(engine: Engine, images: PreprocessedSet, settings: Settings) -> Outcome:
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(settings.scenario) as progress,
    ):
        return run_test(
            engine,
            images,
            settings,
            "PerformanceOnly",
            Path(folder),
            timeout_s=TIMEOUT_S,
            progress=progress,
        )


def _threads(count: int | None) -> str:
    return "" if count is None else f", {count} thread{'s' if count > 1 else ''}"

"""Measure how a benchmark runs best on this machine, by short LoadGen runs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit import TOMLDocument
from tomlkit.items import InlineTable

from engine.data.preprocessed import PreprocessedSet
from engine.load import ONNX_BACKENDS
from engine.protocol import Engine
from engine.support.environment import cpu_count, cpu_name, gpu_name, now
from engine.support.progress import progress_bar
from harness.benchmarks import DEFAULT
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.settings import Offline, Server, Settings
from harness.loadgen.test import Outcome, run_test
from harness.make.route import Route, build_engine, build_int8, check_data, int8_form
from harness.make.system_config import (
    CONFIGS,
    DEFAULT_VERSION,
    ENGINE_KEYS,
    named_configs,
    read_config_file,
)
from harness.make.targets import TIMEOUT_S, val_images
from harness.results.devices import load_engines, parse_devices

SERVER_QUERIES = 1000
"""Queries of a Server trial at least: early stopping asks 459 to 1,000 for up to two late ones."""

PRECISION = 0.05
"""Relative width at which the search for the arrival rate ends."""

MOST_STREAMS = 4
"""Streams on a device at most: what has not filled a GPU by then will not."""

_LOWEST = 1 / 32  # of the throughput; a lower arrival rate is not looked for
_LONGEST_S = 120.0  # nor one at which a trial of `SERVER_QUERIES` takes longer
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
    devices
        Numbers of GPUs that work together, see `harness.results.devices.load_engines`; None:
        `device` alone.
    """

    engine: str
    device: str
    max_batch: int
    seconds: float
    devices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Tuned:
    """The best settings.

    Attributes
    ----------
    threads
        CPU threads; None: not tuned, as on a GPU.
    streams
        Sessions side by side on each device.
    offline_batch, offline_qps
        Batch of the highest throughput, and that throughput, in samples per second.
    server_batch, server_qps
        Batch of the Server trials and the highest VALID arrival rate; None: no rate was valid.
    """

    threads: int | None
    streams: int
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
    check_data(route, "val", "cal")
    model = build_int8(route, int8_form(tuning.engine, tuning.device)).path
    images = val_images(route, model)
    onnx = tuning.engine in ONNX_BACKENDS

    def engines(batch: int, threads: int | None) -> tuple[Engine, ...]:
        file = model if onnx else build_engine(route, model, tuning.engine, batch)
        # for the largest of all trials: kernels are searched best at the largest batch
        return load_engines(
            tuning.engine,
            file,
            device=tuning.device,
            devices=tuning.devices,
            threads=threads,
            max_batch=tuning.max_batch,
        )

    return search(
        engines,
        images,
        tuning,
        cpu_count() if tuning.device == "cpu" else None,
        route.say,
    )


def search(
    engines: Callable[[int, int | None], Sequence[Engine]],
    images: PreprocessedSet,
    tuning: Tuning,
    threads: int | None,
    say: Callable[[str], None],
) -> Tuned:
    """Search with given engines.

    Parameters
    ----------
    engines
        Loads the engine for a batch and a number of threads, on every device.
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

    def offline(batch: int, threads: int | None, streams: int) -> float:
        settings = Offline(
            min_duration_ms=milliseconds, min_query_count=1, streams=streams, batch_size=batch
        )
        outcome = _trial(engines(batch, threads), images, settings)
        found = float(outcome.detail.values["result_samples_per_second"])
        say(f"Offline, {_words(batch, threads, streams)}: {found:.2f} samples/s")
        return found

    by_batch = climb(lambda batch: offline(batch, threads, 1), tuning.max_batch)
    batch = max(by_batch, key=lambda size: by_batch[size])
    shapes = {(threads, 1): by_batch[batch]}
    if threads is None:
        one = {1: by_batch[batch]}
        found = climb(lambda number: offline(batch, None, number), MOST_STREAMS, one)
        shapes = {(None, number): value for number, value in found.items()}
    else:  # fewer threads leave CPUs to other streams, or to nobody
        for fewer in _halves(threads):
            for number in (1, threads // fewer):
                shapes[fewer, number] = offline(batch, fewer, number)
    best, streams = max(shapes, key=lambda shape: shapes[shape])
    offline_qps = shapes[best, streams]

    # half of the bound is for the engine, the other half for waiting
    bound = Server().target_latency_ms / 1000
    gain = offline_qps / by_batch[batch]
    sessions = streams * len(tuning.devices or [tuning.device])
    seconds = {size: sessions / gain * size / by_batch[size] for size in by_batch}
    fitting = [size for size in by_batch if seconds[size] <= bound / 2]
    server_batch = max(fitting, key=lambda size: by_batch[size], default=1)
    loaded = engines(server_batch, best)

    def valid(qps: float) -> bool:
        settings = Server(
            min_duration_ms=milliseconds,
            min_query_count=SERVER_QUERIES,
            target_qps=qps,
            streams=streams,
            batch_size=server_batch,
        )
        detail = _trial(loaded, images, settings).detail
        say(
            f"Server, {_words(server_batch, best, streams)}, {qps:.2f} queries/s: p99 "
            f"{detail.latency_ms['p99']:.1f} ms, {'VALID' if detail.valid else 'INVALID'}"
        )
        return bool(detail.valid)

    if seconds[1] >= bound:
        say(f"Server: one image takes longer than {1000 * bound:g} ms")
        return Tuned(best, streams, batch, offline_qps, None, None)
    ceiling = by_batch[server_batch] * gain
    floor = max(_LOWEST * ceiling, SERVER_QUERIES / _LONGEST_S)
    server_qps = highest_valid(valid, floor, ceiling)
    if server_qps is None:
        say(f"Server: no rate of {floor:.2f} to {ceiling:.2f} queries/s was valid")
        return Tuned(best, streams, batch, offline_qps, None, None)
    return Tuned(best, streams, batch, offline_qps, server_batch, server_qps)


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def climb(
    measure: Callable[[int], float], largest: int, known: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Measure sizes 1, 2, 4, … and the largest, until larger ones gain nothing.

    Parameters
    ----------
    measure
        Measures a size.
    largest
        Largest size.
    known
        What was measured before.

    Returns
    -------
    dict
        Size to what was measured.
    """
    found: dict[int, float] = dict(known or {})
    size = 1
    while True:
        if size not in found:
            found[size] = measure(size)
        best = max(found, key=lambda tried: found[tried])
        if size == largest or sum(tried > best for tried in found) >= _WORSE_IN_A_ROW:
            return found
        size = min(2 * size, largest)


def highest_valid(valid: Callable[[float], bool], floor: float, ceiling: float) -> float | None:
    """Find the highest value between two others that is valid, by bisection to `PRECISION`.

    Parameters
    ----------
    valid
        Tries a value.
    floor, ceiling
        Neither is tried; the floor is above 0.

    Returns
    -------
    float or None
        A value that was found valid; None when there was none.
    """
    low, high, found = floor, ceiling, None
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if valid(middle):
            low = found = middle
        else:
            high = middle
    return found


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
    which = benchmark.removeprefix(DEFAULT.name).strip("-")
    return CONFIGS / f"{'-'.join(filter(None, (stem, which)))}.toml"


def _machine(device: str) -> tuple[str, str]:
    """Key and name of what a configuration is found by."""
    if not device.startswith("cuda"):
        return "cpu", cpu_name()
    name = gpu_name()
    if name is None:
        raise HarnessError(f"--device {device}: this machine names no GPU")
    return "gpu", name


def read_config(path: Path, benchmark: str, device: str) -> TOMLDocument:
    """Read the configuration file that the figures go into; without one, begin it.

    Raises
    ------
    HarnessError
        When it cannot be read, is for another benchmark or machine, or this one names no GPU.
    """
    key, name = _machine(device)
    if not path.exists():
        document = tomlkit.document()
        document["system"] = {"benchmark": benchmark, key: name}
        return document
    system = read_config_file(path).system
    begins = getattr(system, key)
    if system.benchmark != benchmark or begins is None or not name.startswith(begins):
        raise HarnessError(f"{path} is not for {benchmark} on {name}; name another file with -o")
    return tomlkit.parse(path.read_bytes())


def devices_of(document: TOMLDocument, device: str) -> tuple[int, ...] | None:
    """GPUs of a configuration's ``devices`` (see `parse_devices`), where `device` is ``cuda``."""
    found = document.unwrap().get(DEFAULT_VERSION, {}).get("devices")
    if found is None or device != "cuda":
        return None
    return parse_devices(",".join(map(str, found)) if isinstance(found, list) else str(found))


def put(document: TOMLDocument, tuning: Tuning, found: Tuned) -> None:
    """Put into a configuration what was measured; all else, comments too, stays as it is."""
    note = f"harness tune, {now()[:10]}, trials of {tuning.seconds:g} s"
    default = _table(document, DEFAULT_VERSION)
    engine: dict[str, object] = {"engine": tuning.engine, "device": tuning.device}
    engine |= {"devices": tuning.devices and list(tuning.devices), "threads": found.threads}
    for key in ENGINE_KEYS:  # those of another engine, or of other devices, would not fit it
        if engine.get(key) is None:
            default.pop(key, None)
        else:
            _set(default, key, engine[key], note)
    _set(default, "streams", found.streams, note)
    offline = {"batch_size": found.offline_batch, "target_qps": round(found.offline_qps, 3)}
    measured: dict[str, dict[str, int | float]] = {"Offline": offline}
    if found.server_batch is not None and found.server_qps is not None:
        measured["Server"] = {
            "batch_size": found.server_batch,
            "batch_delay_ms": Server().batch_delay_ms,  # that of the trials
            "target_qps": round(found.server_qps, 3),
        }
    for scenario, values in measured.items():
        table = _table(default, scenario)
        table.pop("streams", None)  # would go before those found
        for key, value in values.items():
            _set(table, key, value, note)


def _table(parent: MutableMapping[str, Any], name: str) -> MutableMapping[str, Any]:
    if name not in parent:
        parent[name] = tomlkit.table() if not isinstance(parent, InlineTable) else {}
    table: MutableMapping[str, Any] = parent[name]
    return table


def _set(table: MutableMapping[str, Any], key: str, value: object, note: str) -> None:
    """Set a value, and beside it say where it is from, instead of what was said of the old one."""
    table[key] = value
    if not isinstance(table, InlineTable):  # which has no room for it
        table[key].comment(note)


def _trial(engines: Sequence[Engine], images: PreprocessedSet, settings: Settings) -> Outcome:
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(settings.scenario) as progress,
    ):
        outcome = run_test(
            engines,
            images,
            settings,
            "PerformanceOnly",
            Path(folder),
            timeout_s=TIMEOUT_S,
            progress=progress,
        )
    if outcome.lost_devices:
        raise RunFailedError(f"{', '.join(outcome.lost_devices)} lost: nothing is tuned by fewer")
    return outcome


def _words(batch: int, threads: int | None, streams: int) -> str:
    found = [f"batch {batch}"]
    if threads is not None:
        found.append(f"{threads} thread{'s' if threads > 1 else ''}")
    if streams > 1:
        found.append(f"{streams} streams")
    return ", ".join(found)

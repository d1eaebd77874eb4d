"""Does memory grow in long runs? ``python -m harness.bench endurance``.

LoadGen runs for minutes in every scenario with an engine that waits and answers. Beside each run
goes a bare one: LoadGen with a SUT that completes its samples as fast, and does nothing else. What
LoadGen itself keeps of a test, above all its log, is in both, so the growth of one less that of the
other is the harness's. All runs go side by side, each in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.support.environment import circumstances, now
from engine.support.files import write_json
from harness.bench.harness import NullEngine, RandomImages, bare_run, run_once
from harness.loadgen.settings import (
    SCENARIOS,
    MultiStream,
    Offline,
    Server,
    Settings,
    SingleStream,
)

_PACE_S = 0.02
"""For a batch: LoadGen's own log takes GiB a minute where an engine does nothing at all."""
_BATCH = 8
_SERVER_QPS = 50.0
_MIB = 1 << 20
_SETTLED = 0.1  # of a run, before which growth is that of a start


def bench(
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    *,
    minutes: Annotated[float, typer.Option(min=0.05, help="Length of a run.")] = 10.0,
    server_minutes: Annotated[float, typer.Option(min=0.05, help="Length of Server's.")] = 30.0,
) -> None:
    """Measure the growth of memory in every scenario and write the figures to a JSON file."""
    document: dict[str, Any] = {
        **circumstances("mlcommons-loadgen", "numpy"),
        "seconds_per_batch": _PACE_S,
        "runs": measure(dict.fromkeys(SCENARIOS, minutes) | {"Server": server_minutes}),
        "finished": now(),
    }
    for name, run in document["runs"].items():
        typer.echo(f"{name}: {run['growth_less_loadgen_mib_per_minute']:.3f} MiB a minute")
    write_json(output, document)


def measure(minutes: dict[str, float]) -> dict[str, Any]:
    """Run scenarios and their bare peers side by side.

    Parameters
    ----------
    minutes
        Length of the run of each scenario.

    Returns
    -------
    dict
        By scenario: both runs, with resident memory in MiB at every tenth of their length and its
        growth in MiB a minute after the first, by least squares; the difference of the growths.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2 * len(minutes), context, max_tasks_per_child=1) as pool:
        going = {
            name: [pool.submit(_run, name, 60 * length, bare=bare) for bare in (False, True)]
            for name, length in minutes.items()
        }
        found: dict[str, Any] = {}
        for name, (harness, bare) in going.items():
            ours, peer = harness.result(), bare.result()
            growth = ours["growth_mib_per_minute"] - peer["growth_mib_per_minute"]
            found[name] = {
                "minutes": minutes[name],
                "harness": ours,
                "bare": peer,
                "growth_less_loadgen_mib_per_minute": growth,
            }
    return found


def settings_of(scenario: str, seconds: float) -> Settings:
    """Settings of a run of a scenario that goes on for so long."""
    length = round(1000 * seconds)
    pace_ms = 1000 * _PACE_S
    return {
        "SingleStream": SingleStream(min_duration_ms=length, target_latency_ms=pace_ms / 2),
        "MultiStream": MultiStream(
            min_duration_ms=length, min_query_count=1, target_latency_ms=pace_ms / 2
        ),
        "Offline": Offline(
            min_duration_ms=length,
            min_query_count=1,
            target_qps=0.95 * _BATCH / _PACE_S,
            batch_size=_BATCH,
        ),
        "Server": Server(min_duration_ms=length, target_qps=_SERVER_QPS, batch_size=_BATCH),
    }[scenario]


def _run(scenario: str, seconds: float, *, bare: bool) -> dict[str, Any]:
    """Run LoadGen in this process, and watch its memory."""
    settings = settings_of(scenario, seconds)
    watch = _Watch()
    if bare:
        detail = bare_run(settings, lambda samples: _answer(samples, settings))
    else:
        engine = NullEngine(_PACE_S)
        detail = run_once(engine, RandomImages(engine.input_spec), settings).detail
    times, resident = watch.end()
    tenths = np.interp(np.linspace(0, seconds, 11), times, resident)
    return {
        "valid": detail.valid,
        "queries": detail.values["result_query_count"],
        "rss_mib": [round(float(value), 2) for value in tenths],
        "peak_rss_mib": round(float(resident.max()), 2),
        "growth_mib_per_minute": growth(times, resident, seconds),
    }


def growth(times: NDArray[np.float64], resident: NDArray[np.float64], seconds: float) -> float:
    """Growth of memory a minute, by least squares.

    Parameters
    ----------
    times
        float64 [N], seconds since the start.
    resident
        float64 [N], of any unit.
    seconds
        Length of the run; what comes after, as when LoadGen writes its logs, does not count, nor
        does its first tenth.
    """
    counted = (times > _SETTLED * seconds) & (times < seconds)
    return 60 * float(np.polyfit(times[counted], resident[counted], 1)[0])


def _answer(samples: Sequence[Any], settings: Settings) -> None:
    """Complete the samples of a query batch by batch, each as late as the engine would."""
    import mlperf_loadgen as lg

    for start in range(0, len(samples), settings.batch):
        if not isinstance(settings, Server):  # there, LoadGen could not send the next one
            time.sleep(_PACE_S)
        done = samples[start : start + settings.batch]
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in done])


class _Watch:
    """Resident memory of this process, every half second from now on."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        begin = time.monotonic()
        while not self._found or not self._ended.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE") / _MIB
            self._found.append((time.monotonic() - begin, resident))

    def end(self) -> Any:
        """Seconds since the start, and MiB: float64 [2, N]."""
        self._ended.set()
        self._thread.join()
        return np.array(self._found).T

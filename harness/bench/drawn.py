"""What LoadGen's queries take before they are sent: ``python -m harness.bench drawn``.

LoadGen draws the queries of SingleStream and MultiStream before the run: twice as many as fit into
its least duration at the expected latency. Bare LoadGen is run with one latency as expected and
with a hundredth of it, each time in a process of its own, whose peak of memory is compared.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.support.environment import circumstances, now
from engine.support.files import write_json
from harness.bench.harness import bare_run
from harness.loadgen.settings import MultiStream, SingleStream

_SECONDS = 2.0
_EXPECTED_MS = (1.0, 0.01)


def bench(
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
) -> None:
    """Measure the memory of a query in both scenarios and write the figures to a JSON file."""
    document: dict[str, Any] = {
        **circumstances("mlcommons-loadgen"),
        "seconds": _SECONDS,
        "expected_ms": _EXPECTED_MS,
        "scenarios": {name: measure(name) for name in ("SingleStream", "MultiStream")},
        "finished": now(),
    }
    for name, found in document["scenarios"].items():
        typer.echo(f"{name}: {found['bytes_per_query']:.0f} bytes a query")
    write_json(output, document)


def measure(scenario: str) -> dict[str, Any]:
    """Measure the peak of memory, in MiB, by expected latency, and the bytes of a query."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        peaks = [pool.submit(_peak, scenario, one).result() for one in _EXPECTED_MS]
    drawn = [2 * 1000 * _SECONDS / one for one in _EXPECTED_MS]
    return {
        "peak_mib": [peak / 2**20 for peak in peaks],
        "bytes_per_query": (peaks[1] - peaks[0]) / (drawn[1] - drawn[0]),
    }


def _peak(scenario: str, expected_ms: float) -> int:
    """Peak of resident memory of a run, in bytes."""
    kind = {"SingleStream": SingleStream, "MultiStream": MultiStream}[scenario]
    bare_run(
        kind(
            min_duration_ms=round(1000 * _SECONDS),
            min_query_count=1,
            target_latency_ms=expected_ms,
        ),
        _answer,
    )
    # the peak of getrusage is that of the process it came from, too
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _answer(samples: Sequence[Any]) -> None:
    """Complete a query, late enough for few to be sent."""
    import mlperf_loadgen as lg

    time.sleep(0.01)
    lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

"""A model on a Triton server against the same without one: ``python -m harness.bench triton``.

The server runs on this machine, with Triton's Python backend. In turns, each through LoadGen:
Offline; Server with more queries than can be answered, for its throughput; Server at half of the
throughput, for its latency. Triton's own statistics tell where the time of a request goes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.backends.triton.engine import TritonEngine
from engine.backends.triton.engine import load as connect
from engine.load import load_engine
from engine.protocol import Engine
from engine.support.environment import circumstances, now
from engine.support.files import write_json
from harness.bench.harness import RandomImages, run_once
from harness.loadgen.settings import Offline, Server, Settings
from harness.triton.repository import write_repository
from harness.triton.server import find_server, running_server

_OVERLOAD, _HALF = 2.0, 0.5


def bench(
    model: Annotated[Path, typer.Argument(help="ONNX detector.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    *,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians count.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a turn.")] = 10.0,
    build_dir: Annotated[Path, typer.Option(envvar="BUILD_DIR", help="Build folder.")] = Path(
        "build"
    ),
) -> None:
    """Compare Triton with the engine that it runs, and write the figures to a JSON file."""
    direct = load_engine("onnxruntime", model)
    with tempfile.TemporaryDirectory() as folder:
        repository = write_repository(model, Path(folder, "models"), "python", max_batch=batch)
        with running_server(find_server(build_dir), repository, Path(folder, "log")) as server:
            triton = connect(model, device=server.url)
            document: dict[str, Any] = {
                **circumstances("mlcommons-loadgen", "onnxruntime", "tritonclient"),
                "direct": dict(direct.manifest),
                "triton": dict(triton.manifest),
                **measure(direct, triton, batch, rounds, seconds),
                "finished": now(),
            }
    write_json(output, document)
    for name in ("Offline", "Server", "Server at half load"):
        typer.echo(f"{name}: {json.dumps(document[name])}")


def measure(
    direct: Engine, triton: TritonEngine, batch: int, rounds: int, seconds: float
) -> dict[str, object]:
    """Run the scenarios on both engines in turns.

    Returns
    -------
    dict
        For each: the figures of every turn, the ratio of their medians (Triton over direct), and
        the milliseconds of one request through Triton by where they go.
    """
    rate = _offline_rate(direct, batch)
    scenarios: dict[str, tuple[Settings, str]] = {
        "Offline": (
            Offline(
                min_duration_ms=1,
                min_query_count=max(batch, round(rate * seconds)),
                target_qps=1.0,
                batch_size=batch,
            ),
            "result_samples_per_second",
        ),
        "Server": (
            Server(
                min_duration_ms=round(1000 * seconds / _OVERLOAD),
                target_qps=_OVERLOAD * rate,
                batch_size=batch,
            ),
            "result_completed_samples_per_sec",
        ),
        "Server at half load": (
            Server(
                min_duration_ms=round(1000 * seconds), target_qps=_HALF * rate, batch_size=batch
            ),
            "p99_ms",
        ),
    }
    return {
        name: _compare(direct, triton, settings, figure, rounds)
        for name, (settings, figure) in scenarios.items()
    }


def _compare(
    direct: Engine, triton: TritonEngine, settings: Settings, figure: str, rounds: int
) -> dict[str, object]:
    source = _Images(triton)
    figures: dict[str, list[float]] = {"direct": [], "triton": []}
    seconds: list[float] = []
    spent: dict[str, float] = dict.fromkeys(triton.server_seconds(), 0.0)
    turns: list[tuple[str, Engine]] = [("direct", direct), ("triton", triton)]
    for _ in range(rounds):
        turns.reverse()  # whoever is first meets the machine as the last turn left it
        for name, engine in turns:
            outcome = run_once(engine, source, settings)
            values = {**outcome.detail.values, "p99_ms": outcome.detail.latency_ms["p99"]}
            figures[name].append(values[figure])
            if name == "triton":
                seconds += outcome.batch_seconds
                for key, value in triton.server_seconds().items():
                    spent[key] += value - source.spent[key]
    requests = spent.pop("requests")
    parts = {f"{key}_ms": 1000 * value / requests for key, value in spent.items()}
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "figure": figure,
        **figures,
        "ratio": medians["triton"] / medians["direct"],
        "request": {
            "mean_ms": 1000 * statistics.fmean(seconds),
            "of_it_in_the_server": parts,
        },
    }


class _Images(RandomImages):
    """Images that note what the server had done when LoadGen loaded them, after the warm-up."""

    def __init__(self, engine: TritonEngine) -> None:
        super().__init__(engine.input_spec)
        self._engine = engine
        self.spent: Mapping[str, float] = {}

    def read_into(self, batch: NDArray[np.generic], indices: Sequence[int]) -> None:
        """See `harness.loadgen.qsl.SampleSource.read_into`."""
        super().read_into(batch, indices)
        self.spent = self._engine.server_seconds()


def _offline_rate(engine: Engine, batch: int) -> float:
    settings = Offline(min_duration_ms=1, min_query_count=4 * batch, batch_size=batch)
    run_once(engine, RandomImages(engine.input_spec), settings)
    outcome = run_once(engine, RandomImages(engine.input_spec), settings)
    return float(outcome.detail.values["result_samples_per_second"])

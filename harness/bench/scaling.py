"""One GPU against several of one host, under LoadGen: ``python -m harness.bench scaling``.

In turns, each test a `harness run` in a process of its own:

- Offline on one GPU, another one in each turn; on all of them together; and apart, a process for
  each GPU side by side, which tells what the machine has to give where together falls short;
- Server on one GPU at a given rate, and on N at N times that rate;
- SingleStream on one GPU and on all.

A first short run on all GPUs, which does not count, fills the caches of the engine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.support.environment import circumstances, now, output_of
from engine.support.files import write_json
from harness.errors import HarnessError
from harness.results.devices import parse_devices
from harness.results.report import find_results
from harness.results.result import RunResult

_PACKAGES = (
    *("mlcommons-loadgen", "numpy", "onnxruntime", "cuda-bindings"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-frontend", "tensorrt"),
)
_SMI = "index,name,uuid,pci.bus_id,driver_version,pcie.link.gen.max,pcie.link.width.max,power.limit"
_PREPARE_S = 1.0

Options = tuple[str, ...]
"""Of ``harness run``."""


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes
    ----------
    common
        The model and its options.
    units
        Options that choose each of the devices alone.
    together
        Options that choose all of them.
    seconds
        Least length of a run.
    folder
        Where the logs go.
    build_dir
        The build folder.
    """

    common: Options
    units: Sequence[Options]
    together: Options
    seconds: float
    folder: Path
    build_dir: Path

    def run(self, *devices: Options, scenario: str, more: Options = ()) -> list[RunResult]:
        """Run a scenario in a process for each of `devices`, side by side."""
        return run_harness(
            [(*self.common, *own, "--scenarios", scenario, *more) for own in devices],
            self.seconds,
            self.folder,
            self.build_dir,
        )


def bench(
    model: Annotated[Path, typer.Argument(help="Model file, as for harness run.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    *,
    engine: Annotated[str, typer.Option(help="Its engine.")] = "cudnn",
    devices: Annotated[
        str | None, typer.Option(help="Numbers of the GPUs, as 0,1; or all.", show_default="all")
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(min=2, help="Instead of GPUs: sessions on the CPU, of one thread each."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="Data set, preprocessed for the model.")] = "demo",
    data: Annotated[
        Path | None, typer.Option(help="Folder of its preprocessed images, as --preprocessed.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch of Offline and Server.", show_default="run's")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Sessions on each GPU.")] = 1,
    server_qps: Annotated[
        float | None,
        typer.Option(help="Server's rate on one GPU.", show_default="Server is not run"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians count.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, help="Least length of a run.")] = 60.0,
    build_dir: Annotated[Path, typer.Option(envvar="BUILD_DIR", help="Build folder.")] = Path(
        "build"
    ),
) -> None:
    """Compare one GPU with several, and write the figures to a JSON file."""
    if sessions is not None:
        if devices is not None:
            raise HarnessError("give --devices or --sessions")
        units: list[Options] = [("--device=cpu", "--threads=1", "--streams=1")] * sessions
        together: Options = ("--device=cpu", "--threads=1", f"--streams={sessions}")
    else:
        numbers = parse_devices(devices or "all")
        if len(numbers) < 2:
            raise HarnessError(f"two GPUs at least are compared, not {len(numbers)}")
        own = f"--streams={streams}"
        units = [(f"--devices={number}", own) for number in numbers]
        together = (f"--devices={','.join(map(str, numbers))}", own)
    common = [str(model), f"--engine={engine}", f"--dataset={dataset}"]
    common += [] if data is None else [f"--preprocessed={data}"]
    of_batches = () if batch is None else (f"--batch={batch}",)
    head = {
        **circumstances(*_PACKAGES),
        "driver": _lines("nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"),
        "topology": _lines("nvidia-smi", "topo", "-m"),
    }
    with tempfile.TemporaryDirectory() as folder:
        one = Bench(tuple(common), units, together, seconds, Path(folder), build_dir)
        document = {**head, **measure(one, of_batches, server_qps, rounds)}
    write_json(output, {**document, "finished": now()})
    for line in _summary(document):
        typer.echo(line)
    typer.echo(f"figures in {output}")


def measure(
    this: Bench, of_batches: Options, server_qps: float | None, rounds: int
) -> dict[str, Any]:
    """Run everything.

    Returns
    -------
    dict
        What ran, its devices, every run, and for each scenario the figures of one, together and
        apart (Offline), and the ratios of their medians.
    """
    number = len(this.units)
    brief = replace(this, seconds=min(_PREPARE_S, this.seconds))
    (first,) = brief.run(this.together, scenario="Offline", more=of_batches)
    rows: list[dict[str, Any]] = []

    def note(way: str, results: Sequence[RunResult]) -> None:
        rows.append(_row(way, results))
        typer.echo(f"{rows[-1]['scenario']} {way}: {rows[-1]['value']:.2f} {results[0].metric}")

    for turn in range(rounds):
        alone = this.units[turn % number]
        for way, devices in _in_turn(turn, alone, this):
            note(way, this.run(*devices, scenario="Offline", more=of_batches))
        for way, devices in _in_turn(turn, alone, this, apart=False):
            if server_qps is not None:
                rate = server_qps * (1 if way == "one" else number)
                more = (*of_batches, f"--target-qps={rate}")
                note(way, this.run(*devices, scenario="Server", more=more))
        for way, devices in _in_turn(turn, alone, this, apart=False):
            note(way, this.run(*devices, scenario="SingleStream"))
    engine = {key: value for key, value in first.engine.items() if key not in {"gpus", "devices"}}
    return {
        "engine": engine,
        "devices": first.engine["devices"],
        "gpus": first.engine.get("gpus", []),
        "of": number,
        "seconds": this.seconds,
        "runs": rows,
        **{name: _compared(rows, name, number) for name in dict.fromkeys(_names(rows))},
    }


def _in_turn(
    turn: int, alone: Options, this: Bench, *, apart: bool = True
) -> Iterator[tuple[str, Sequence[Options]]]:
    """Ways and the devices of their processes; who is first meets what the last turn left."""
    ways: list[tuple[str, Sequence[Options]]] = [("one", [alone]), ("together", [this.together])]
    ways += [("apart", this.units)] if apart else []
    return iter(ways if turn % 2 == 0 else ways[::-1])


def run_harness(
    commands: Sequence[Options], seconds: float, folder: Path, build_dir: Path
) -> list[RunResult]:
    """Run ``harness run`` with each of these options, side by side.

    Raises
    ------
    HarnessError
        When one fails, with what it said last.
    """
    begun: list[tuple[subprocess.Popen[bytes], Path, Path]] = []
    places = (
        folder / f"run{number}" for number in count() if not (folder / f"run{number}").exists()
    )
    for options in commands:
        place = next(places)
        place.mkdir()
        said = place / "said"
        shared = [f"--min-duration={seconds}", "--min-queries=1", "--system=here"]
        shared += [f"--build-dir={build_dir}", f"--log-dir={place / 'logs'}"]
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "harness", "run", *options, *shared],
                stdout=file,
                stderr=file,
                env={**os.environ, "BUILD_DIR": str(build_dir)},
            )
        begun.append((process, said, place / "logs"))
    try:
        for process, _, _ in begun:
            process.wait()
    finally:
        for process, _, _ in begun:
            process.kill()
    for process, said, _ in begun:
        if process.returncode:
            lines = said.read_text(errors="replace").splitlines() or ["it said nothing"]
            raise HarnessError(
                f"harness run ended with exit code {process.returncode}: {lines[-1]}"
            )
    return [result for _, _, logs in begun for _, result in find_results([logs])]


def _row(way: str, results: Sequence[RunResult]) -> dict[str, Any]:
    """A run, or several side by side, whose rates are added and of whose latencies the worst is."""
    rate = results[0].scenario in {"Offline", "Server"}
    values = [float(result.value or 0) for result in results]
    row: dict[str, Any] = {
        "scenario": results[0].scenario,
        "way": way,
        "devices": [device for result in results for device in result.engine["devices"]],
        "metric": results[0].metric,
        "value": sum(values) if rate else max(values),
        "values": values,
        "valid": [result.valid for result in results],
        "errors": [error for result in results for error in (*result.errors, *result.warnings)],
        "batch": results[0].settings.get("batch_size"),
        "target_qps": results[0].settings.get("target_qps"),
        "latency_ms": _worst([result.latency_ms for result in results]),
        "batch_latency_ms": _worst([result.batch_latency_ms for result in results]),
        "finished": [result.finished for result in results],
    }
    if len(results) > 1:
        row["overlap"] = _overlap(results)
    return row


def _worst(latencies: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: max(one.get(name, 0.0) for one in latencies)
        for name in ("p50", "p90", "p99")
        if any(name in one for one in latencies)
    }


def _overlap(results: Sequence[RunResult]) -> float:
    """Share of the longest run for which all ran, to the second: loading may take longer here."""
    ends = [datetime.fromisoformat(result.finished).timestamp() for result in results]
    lengths = [result.latency_ms["max"] / 1000 for result in results]  # Offline is one query
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    return max(0.0, min(ends) - max(starts)) / max(lengths)


def _names(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    return (str(row["scenario"]) for row in rows)


def _compared(rows: Sequence[Mapping[str, Any]], scenario: str, number: int) -> dict[str, Any]:
    """Figures of a scenario by way, and ratios of their medians to that of one."""
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["scenario"] == scenario:
            ways.setdefault(row["way"], []).append(row)
    medians = {way: statistics.median(row["value"] for row in ways[way]) for way in ways}
    found: dict[str, Any] = {
        "metric": ways["one"][0]["metric"],
        **{way: [row["value"] for row in ways[way]] for way in ways},
        "valid": {way: [all(row["valid"]) for row in ways[way]] for way in ways},
        "p99_ms": {way: [row["latency_ms"].get("p99") for row in ways[way]] for way in ways},
        **{f"{way} over one": medians[way] / medians["one"] for way in medians if way != "one"},
    }
    if scenario != "SingleStream":
        found["share of linear"] = found["together over one"] / number
    return found


def _summary(document: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys(_names(document["runs"])):
        found = document[name]
        ratios = ", ".join(f"{key} {value:.3f}" for key, value in found.items() if " " in key)
        invalid = [way for way, valid in found["valid"].items() if not all(valid)]
        yield f"{name}: {ratios}" + (f"; INVALID: {', '.join(invalid)}" if invalid else "")


def _lines(*command: str) -> list[str] | None:
    said = output_of(*command)
    return None if said is None else said.splitlines()

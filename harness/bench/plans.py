"""TensorRT plans in every scenario, directly and through Triton: ``python -m harness.bench plans``.

For each ONNX model: the mAP by ONNX Runtime on the CPU; a plan, built here; then, without a server
and through a server on this machine with Triton's TensorRT backend (one and two instances, images
by CUDA and by system shared memory), accuracy runs with batches of 1, of 8 and of mixed sizes, and
performance runs. The exit code is 1 when a mAP is wrong or a run is INVALID.

Wrong is a mAP that differs from the plan's own, without a server, by more than 0.001, or from ONNX
Runtime's by more than 0.001, or 1 % where the model is INT8: its graph optimisations round
elsewhere than the graph says, which alone moved the demo model's mAP by 0.001 to 0.002
(docs/measurements/int8_rounding.json).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.backends.tensorrt.build import build
from engine.backends.tensorrt.options import BuildOptions
from engine.backends.triton.engine import TritonEngine
from engine.backends.triton.engine import load as connect
from engine.backends.triton.memory import SystemMemory
from engine.load import load_engine
from engine.model import load_detector
from engine.protocol import Engine
from engine.support.environment import circumstances, now
from engine.support.files import write_json
from harness.data.dataset import known_dataset, preprocessed_dir
from harness.data.preprocess import open_current
from harness.errors import HarnessError
from harness.loadgen.settings import Mode, MultiStream, Offline, Server, Settings, SingleStream
from harness.results.run import Benchmark, run
from harness.triton.repository import write_repository
from harness.triton.server import find_server, running_server

_TOLERANCE = 0.001
_INT8_SHARE = 0.01  # as in `engine compare`
_BATCH = 8
_PLAN = BuildOptions(opt_batch=_BATCH, max_batch=2 * _BATCH)
_LOAD = 0.5  # of the Offline rate, for Server
_TIMEOUT_S = 60.0

Way = tuple[str, Engine]
"""How images come to a plan, in words, and the engine that does it."""


def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX detectors with an NMS_OPT_TRT node.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    plugin: Annotated[Path, typer.Option(help="libnmsoptplugin.so.")],
    *,
    dataset: Annotated[str, typer.Option(help="Data set, preprocessed for the models.")] = "demo",
    seconds: Annotated[float, typer.Option(min=1, help="Length of a performance run.")] = 10.0,
    build_dir: Annotated[Path, typer.Option(envvar="BUILD_DIR", help="Build folder.")] = Path(
        "build"
    ),
) -> None:
    """Run plans in every scenario and every way, and write the figures to a JSON file."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            rows += _measure(model, plugin, dataset, seconds, build_dir, Path(folder, model.stem))
    wrong = [row for row in rows if not row["right"]]
    document = {
        **circumstances("mlcommons-loadgen", "onnxruntime", "tritonclient"),
        "finished": now(),
        "largest_difference_of_mAP": max(abs(row.get("difference", 0.0)) for row in rows),
        "wrong": len(wrong),
        "runs": rows,
    }
    write_json(output, document)
    for row in rows:
        figure = "mAP" if row["mode"] == "AccuracyOnly" else row["metric"]
        typer.echo(
            f"{row['model']:<28} {row['way']:<44} {row['scenario']:<12} batch {row['batch']:<2} "
            f"{row['value']:10.4f} {figure}{'' if row['right'] else '  WRONG'}"
        )
    typer.echo(f"{len(rows)} runs, {len(wrong)} of them wrong or INVALID, in {output}")
    sys.exit(bool(wrong))


def _measure(  # noqa: PLR0917
    model: Path, plugin: Path, dataset: str, seconds: float, build_dir: Path, folder: Path
) -> Iterator[dict[str, Any]]:
    folder.mkdir()
    numbers = count()
    reference = load_engine("onnxruntime", model)
    data = known_dataset(dataset, "val", build_dir)
    source = open_current(
        data, reference.input_spec, preprocessed_dir(build_dir, data, reference.input_spec)
    )

    def one(way: Way, settings: Settings, mode: Mode) -> dict[str, Any]:
        benchmark = Benchmark((way[1],), source, data, _TIMEOUT_S)
        result = run(benchmark, settings, mode, folder / f"run{next(numbers)}")
        return {
            "model": model.name,
            "way": way[0],
            "scenario": result.scenario,
            "mode": mode,
            "batch": settings.batch,
            "metric": result.metric,
            "value": result.value,
            "valid": result.valid,
            "version": result.engine["version"],
            "latency_ms": {name: result.latency_ms.get(name) for name in ("p50", "p99")},
        }

    cpu = one(("ONNX Runtime", reference), Offline(batch_size=_BATCH), "AccuracyOnly")
    yield {**cpu, "right": True}
    quantized = reference.input_spec.dtype == "int8"
    allowed = _INT8_SHARE * cpu["value"] if quantized else _TOLERANCE
    own: float | None = None  # the plan's, without a server
    plan = folder / f"{model.stem}.engine"
    cache = build_dir / "engines" / "timing.cache"
    build(
        load_detector(model),
        "tensorrt",
        plan,
        replace(_PLAN, plugins=(plugin,), timing_cache=cache),
    )
    for way in _ways(plan, build_dir, folder):
        for settings in _accuracy_tests():
            row = one(way, settings, "AccuracyOnly")
            difference = row["value"] - cpu["value"]
            own = row["value"] if own is None else own
            right = abs(difference) <= allowed and abs(row["value"] - own) <= _TOLERANCE
            yield {**row, "difference": difference, "right": right}
        duration_ms = round(1000 * seconds)
        offline = Offline(min_duration_ms=duration_ms, batch_size=_BATCH)
        bulk = one(way, offline, "PerformanceOnly")
        yield {**bulk, "right": bulk["valid"]}
        for settings in _latency_tests(duration_ms, _LOAD * bulk["value"]):
            row = one(way, settings, "PerformanceOnly")
            yield {**row, "right": row["valid"]}


def _accuracy_tests() -> Sequence[Settings]:
    """Batches of 1, of 8, and of what a Server run brings."""
    return (
        Offline(batch_size=1),
        Offline(batch_size=_BATCH),
        Server(batch_size=_BATCH),
        SingleStream(),
        MultiStream(),
    )


def _latency_tests(duration_ms: int, rate: float) -> Sequence[Settings]:
    return (
        Server(min_duration_ms=duration_ms, batch_size=_BATCH, target_qps=rate),
        SingleStream(min_duration_ms=duration_ms),
        MultiStream(min_duration_ms=duration_ms),
    )


def _ways(plan: Path, build_dir: Path, folder: Path) -> Iterator[Way]:
    yield "directly", load_engine("tensorrt", plan)
    for instances in (1, 2):
        words = f"Triton, {instances} instance{'s' * (instances - 1)}"
        repository = write_repository(
            plan, folder / f"models{instances}", "tensorrt", instances=instances
        )
        log = folder / f"server{instances}.log"
        with running_server(find_server(build_dir), repository, log) as server:
            engine = connect(plan, device=server.url)
            for way in (engine, _through_system_memory(engine)):
                yield f"{words}, {way.manifest['images_through']}", way


def _through_system_memory(engine: TritonEngine) -> TritonEngine:
    memory = SystemMemory.negotiate(engine._client)
    if memory is None:
        raise HarnessError("the server does not share system memory with this process")
    manifest = {**engine.manifest, "images_through": memory.name}
    return replace(engine, manifest=manifest, _transport=memory)

"""TensorRT beside the cuDNN engine on this GPU: ``python -m engine.bench tensorrt MODEL PLAN…``.

Both run the same INT8 file in one process and in turns, from images in page-locked memory to
detections on the host: images a second with the next batch under way, latency one batch after the
other, energy, and every layer beside its time. "plan" is the plan alone, a CUDA graph replayed
without copies; "plan_copies" is the same with the batch's copies in line, on one stream.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.backends.cuda import Stream, pci_bus_id, pinned, use_gpu
from engine.backends.cudnn.engine import CudnnEngine
from engine.backends.cudnn.engine import load as load_cudnn
from engine.backends.tensorrt.engine import Engine, make_context, set_addresses, start
from engine.backends.tensorrt.engine import load as load_plan
from engine.backends.tensorrt.layers import PlanLayer, describe_plan
from engine.bench.cudnn import LayerTime, layer_times, operations
from engine.bench.speed import PEAKS, image_pool, parse_batches
from engine.errors import EngineError
from engine.manifest import Manifest, load_manifest
from engine.model import load_detector
from engine.protocol import DETECTIONS, NUM_DETECTIONS
from engine.protocol import Engine as AnyEngine
from engine.speed import batches_of, latency, throughput
from engine.support.environment import circumstances, now
from engine.support.files import write_json

_ROUNDS = 3
"""Turns of each; the median counts."""

_REST = "the rest"

Replay = Callable[[], None]


def bench(
    model: Annotated[Path, typer.Argument(help="INT8 .onnx of 'engine quantize'.")],
    plans: Annotated[
        list[Path],
        typer.Argument(help="Plans of it; a batch takes the one whose best batch is nearest."),
    ],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of INT8 images of 'harness preprocess'.", show_default="noise"),
    ] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8,64,128",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each turn.")] = 2.0,
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU.")] = 0,
) -> None:
    """Measure both engines in turns, and write the figures to a JSON file."""
    sizes = parse_batches(batches)
    detector = load_detector(model)
    manifests = {path: load_manifest(path) for path in plans}
    for path, manifest in manifests.items():
        if manifest.onnx_sha256 != detector.sha256:
            raise EngineError(f"{path}: built from {manifest.model}, not from {model}")
    loaded = {path: load_plan("tensorrt", path, f"cuda:{device}") for path in plans}
    cudnn = load_cudnn(model, device=f"cuda:{device}", max_batch=sizes[-1])
    images = image_pool(cudnn, data)
    work = operations(cudnn.graph, cudnn.graph.layers)
    peak = PEAKS.get(str(cudnn.manifest["gpu"]))
    document: dict[str, Any] = {
        **circumstances(),
        "manifest": dict(cudnn.manifest),
        "plans": {path.name: manifests[path].to_dict() for path in loaded},
        "images": "noise" if data is None else str(data),
        "seconds": seconds,
        "rounds": _ROUNDS,
        "operations_per_image": work,
        "peak": asdict(peak) if peak else None,
        "batches": {},
        "refused": {},
    }
    meter = _energy_meter(device)
    for size in sizes:
        try:
            path = _plan_for(size, manifests)
        except EngineError as error:  # as of 94 images of 1200x1200 and more
            document["refused"][str(size)] = str(error)
            typer.echo(f"batch {size}: {error}")
            continue
        entry = _both(loaded[path], cudnn, images, size, seconds, meter)
        document["batches"][str(size)] = {"plan_file": path.name, **entry}
        tensorrt, copies, own = (entry[name] for name in ("tensorrt", "plan_copies", "cudnn"))
        typer.echo(
            f"batch {size}: TensorRT {tensorrt['images_per_s']:.0f} images/s (plan alone "
            f"{entry['plan']['images_per_s']:.0f}), p50 {tensorrt['p50_ms']:.3f} ms (plan and "
            f"copies {copies['p50_ms']:.3f}); cudnn {own['images_per_s']:.0f}, "
            f"{own['p50_ms']:.3f} ms"
        )
        write_json(output, document | {"finished": now()})
    write_json(output, document | {"finished": now()})


def _both(  # noqa: PLR0917
    plan: Engine,
    cudnn: CudnnEngine,
    images: NDArray[np.int8],
    size: int,
    seconds: float,
    meter: Callable[[], float] | None,
) -> dict[str, Any]:
    """Measure one batch size in turns, then the layers."""
    with ExitStack() as open_ones:
        ways = {
            "tensorrt": _session(open_ones, plan, images, size),
            "cudnn": _session(open_ones, cudnn, images, size),
            "plan": _plan_alone(open_ones, plan, size),
            "plan_copies": _plan_with_copies(open_ones, plan, images, size),
        }
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(_ROUNDS):
            for name, way in ways.items():
                turns[name].append(_turn(way, seconds, meter))
    entry: dict[str, Any] = {name: _medians(found) for name, found in turns.items()}
    speed = {name: one["images_per_s"] for name, one in entry.items()}
    layers, own = describe_plan(plan, size).layers, layer_times(cudnn, size)
    return entry | {
        "cudnn_over_tensorrt": speed["cudnn"] / speed["tensorrt"],
        "tensorrt_over_plan": speed["tensorrt"] / speed["plan"],
        "layers": [asdict(row) for row in side_by_side(own, layers)],
        "tensorrt_layers": [asdict(layer) for layer in layers],
        "cudnn_layers": [asdict(layer) for layer in own],
        "turns": turns,
    }


@dataclass(frozen=True)
class LayerPair:
    """A step of the cuDNN engine beside what TensorRT makes of the same nodes.

    Attributes
    ----------
    name
        Of the step; ``the rest`` for layers of the plan that have none of its nodes: formats.
    cudnn_ms, tensorrt_ms
        Time of a batch, each layer by itself. 0 where an engine has nothing for it.
    floor_ms
        See `engine.bench.cudnn.LayerTime`.
    """

    name: str
    cudnn_ms: float
    tensorrt_ms: float
    floor_ms: float | None


def side_by_side(own: Sequence[LayerTime], plan: Sequence[PlanLayer]) -> list[LayerPair]:
    """Pair the layers of both engines by the names of the ONNX nodes in them.

    A layer of the plan that has nodes of several steps counts for the first of them.
    """
    steps = {node: step.name for step in own for node in _nodes(step.name)}
    times = dict.fromkeys([*(step.name for step in own), _REST], 0.0)
    for layer in plan:
        found = next((steps[node] for node in _nodes(layer.name) if node in steps), _REST)
        times[own[-1].name if "Plugin" in layer.kind else found] += layer.ms
    pairs = [LayerPair(step.name, step.ms, times[step.name], step.floor_ms) for step in own]
    return [*pairs, LayerPair(_REST, 0.0, times[_REST], None)]


def _nodes(name: str) -> list[str]:
    """Names of nodes in that of a layer, among the words of a sentence perhaps."""
    return re.split(r"[^\w./:-]+", name)


@dataclass(frozen=True)
class _Way:
    """A way to run batches: what measures images a second, and what measures latency."""

    speed: Callable[[float], Mapping[str, float]]
    latency: Callable[[float], Mapping[str, float]]


def _plan_for(size: int, manifests: Mapping[Path, Manifest]) -> Path:
    """Choose the plan that takes a batch and was tuned for one as near as can be."""
    fits = [p for p, m in manifests.items() if m.min_batch <= size <= m.max_batch]
    if not fits:
        raise EngineError(f"no plan takes {size} images")
    return min(fits, key=lambda path: abs(manifests[path].opt_batch - size))


def _turn(way: _Way, seconds: float, meter: Callable[[], float] | None) -> dict[str, float]:
    """One turn of a way, with the energy of its images where the GPU counts it."""
    before, begin = meter and meter(), time.perf_counter()
    found = dict(way.speed(seconds))
    if meter is not None and before is not None:
        watts = (meter() - before) / (time.perf_counter() - begin)
        found["joules_per_image"] = watts / found["images_per_s"]
    return {**found, **way.latency(seconds / 2)}


def _medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.median([turn[key] for turn in turns])) for key in turns[0]}


def _session(held: ExitStack, engine: AnyEngine, images: NDArray[np.int8], size: int) -> _Way:
    session = engine.session()
    held.callback(session.close)
    return _Way(partial(throughput, session, images, size), partial(latency, session, images, size))


def _bound(held: ExitStack, engine: Engine, size: int) -> tuple[Stream, Mapping[str, int], Replay]:
    """Record a plan with buffers of its own; its stream, addresses, and what replays it."""
    use_gpu(engine.device)
    stream = held.enter_context(closing(Stream()))
    spec, plan = engine.input_spec, engine.plan
    _, rows, fields = plan.get_tensor_shape(DETECTIONS)
    addresses = {
        spec.name: stream.device(size * int(np.prod(spec.shape))),
        DETECTIONS: stream.device(4 * size * rows * fields),
        NUM_DETECTIONS: stream.device(4 * size),
    }
    memory = stream.device(plan.device_memory_size_v2)
    context = make_context(engine.trt, plan, memory, spec, size)
    held.callback(lambda: context)  # kept for as long as its graph
    set_addresses(context, addresses)
    start(context, stream)
    stream.synchronize()
    return stream, addresses, stream.capture(lambda: start(context, stream))


def _plan_alone(held: ExitStack, engine: Engine, size: int) -> _Way:
    stream, addresses, replay = _bound(held, engine, size)
    shape = (size, *engine.input_spec.shape)
    stream.upload(
        addresses[engine.input_spec.name],
        np.random.default_rng(0).integers(-60, 61, shape, np.int8),
    )

    def speed(seconds: float) -> dict[str, float]:
        turns, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for _ in range(4):
                replay()
            stream.synchronize()
            turns += 4
        return {"images_per_s": turns * size / (time.perf_counter() - begin)}

    def wait() -> None:
        replay()
        stream.synchronize()

    return _Way(speed, partial(_latencies, wait))


def _plan_with_copies(held: ExitStack, engine: Engine, images: NDArray[np.int8], size: int) -> _Way:
    stream, addresses, replay = _bound(held, engine, size)
    _, rows, fields = engine.plan.get_tensor_shape(DETECTIONS)
    detections, counts = pinned((size, rows, fields), np.float32), pinned((size,), np.int32)
    runs = batches_of(images, size)[0]

    def wait() -> None:
        address = addresses[engine.input_spec.name]
        for run in runs:
            stream.upload(address, run)
            address += run.nbytes
        replay()
        stream.download(detections, addresses[DETECTIONS])
        stream.download(counts, addresses[NUM_DETECTIONS])
        stream.synchronize()

    def speed(seconds: float) -> dict[str, float]:
        found = _latencies(wait, seconds)
        return {"images_per_s": 1e3 * size / found["mean_ms"]}

    return _Way(speed, partial(_latencies, wait))


def _latencies(work: Callable[[], None], seconds: float) -> dict[str, float]:
    turns: list[float] = []
    end = time.perf_counter() + seconds
    while len(turns) < 10 or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        turns.append(1e3 * (time.perf_counter() - begin))
    p50, p99 = np.percentile(turns, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "mean_ms": float(np.mean(turns))}


def _energy_meter(device: int) -> Callable[[], float] | None:
    """Return what reads the joules that the GPU has taken; None without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        typer.echo("no joules: pip install nvidia-ml-py")
        return None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id(device).encode())
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

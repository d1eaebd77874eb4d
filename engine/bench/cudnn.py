"""The cuDNN engine on this GPU: ``python -m engine.bench cudnn MODEL.int8.onnx -o JSON``.

For every batch size, in one run, from images in page-locked memory to detections on the host:
images a second with the next batch under way, latency one batch after the other, and the time of
every layer by itself beside its floor: what the GPU's peak and its memory would need.

With --peer, the same network in PyTorch, float16, channels_last, torch.compile, with
torchvision's NMS for each image.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.backends.cuda import check, runtime
from engine.backends.cudnn.engine import CudnnEngine, batch_sizes, load
from engine.backends.cudnn.graph import Convolution, Int8Graph, Layer
from engine.backends.cudnn.times import step_times
from engine.bench.speed import PEAKS, Peak, image_pool, parse_batches
from engine.errors import EngineError
from engine.speed import latency, throughput
from engine.support.environment import circumstances, now
from engine.support.files import write_json
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.terminal import new_console


@dataclass(frozen=True)
class LayerTime:
    """A layer by itself.

    Attributes
    ----------
    name, kernel
        Its nodes, and how they are run.
    ms
        Its time, on data that the run before left.
    tops
        Multiplications and additions a second, times 10^-12.
    floor_ms
        The larger of operations at the GPU's peak and bytes at its bandwidth; None: GPU unknown.
    ratio
        ms over floor_ms.
    """

    name: str
    kernel: str
    ms: float
    tops: float
    floor_ms: float | None
    ratio: float | None


def bench(
    model: Annotated[Path, typer.Argument(help="INT8 .onnx of 'engine quantize'.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of INT8 images of 'harness preprocess'.", show_default="noise"),
    ] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,4,8,16,32,64,128",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measurement.")] = 3.0,
    peer: Annotated[bool, typer.Option("--peer", help="Also PyTorch.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Measure the engine, and write the figures to a JSON file."""
    sizes = parse_batches(batches)
    prepared = batch_sizes(sizes[-1])
    if other := sorted(set(sizes) - set(prepared)):
        raise EngineError(
            f"--batches {batches}: the engine runs {other[0]} images as more; what it prepares: "
            f"{', '.join(map(str, prepared))}"
        )
    start = time.perf_counter()
    engine = load(model, device=device, max_batch=sizes[-1])
    peak = _peak(engine)
    document: dict[str, Any] = {
        **circumstances(),
        "load_s": time.perf_counter() - start,
        "manifest": dict(engine.manifest),
        "images": "noise" if data is None else str(data),
        "operations_per_image": operations(engine.graph, engine.graph.layers),
        "peak": asdict(peak) if peak else None,
        "batches": {},
    }
    before, total = _free_and_total_bytes()
    session = engine.session()
    free, _ = _free_and_total_bytes()
    document["session_bytes"] = before - free
    document["gpu_bytes_in_use"] = total - free  # everything on the GPU: weights, CUDA's own
    images = image_pool(engine, data)
    for size in sizes:
        found: dict[str, float | None] = {}
        found |= throughput(session, images, size, seconds)
        found |= latency(session, images, size, seconds)
        tops = (found["images_per_s"] or 0.0) * document["operations_per_image"] / 1e12
        found |= {"tops": tops, "share_of_peak": tops / peak.tops if peak else None}
        document["batches"][str(size)] = found
        typer.echo(
            f"batch {size}: {found['images_per_s']:.1f} images/s, {tops:.0f} TOPS, latency "
            f"p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms"
        )
    session.close()
    for size in sizes:
        layers = layer_times(engine, size)
        document["batches"][str(size)]["layers"] = [asdict(layer) for layer in layers]
    _print_layers(layers)
    if peer:
        write_json(output, document | {"finished": now()})  # the peer takes minutes to compile
        from engine.bench.cudnn_peer import measure_peer, peer_versions

        document["peer"] = {**peer_versions(), "batches": {}}
        for size in sizes:
            figures = measure_peer(engine.graph, engine.parts, images, size, seconds)
            document["peer"]["batches"][str(size)] = figures
            typer.echo(f"PyTorch, batch {size}: {figures['images_per_s']:.1f} images/s")
    write_json(output, document | {"finished": now()})


def operations(graph: Int8Graph, layers: Sequence[Layer]) -> int:
    """Multiplications and additions of some layers for one image."""
    total = 0
    for layer in layers:
        if isinstance(layer, Convolution):
            y = graph.tensors[layer.y]
            total += 2 * layer.weight.size * y.height * y.width
    return total


def least_bytes(graph: Int8Graph, layers: Sequence[Layer], batch: int) -> int:
    """Bytes that layers which run as one read and write at least: tensors once, weights once."""
    first = layers[0]
    names = [first.x, layers[-1].y]
    if isinstance(first, Convolution) and first.residual is not None:
        names.append(first.residual)
    total = sum(layer.weight.nbytes for layer in layers if isinstance(layer, Convolution))
    for name in names:
        tensor = graph.tensors[name]
        size = 1 if tensor.scale is not None else 2
        total += batch * tensor.channels * tensor.height * tensor.width * size
    return total


def layer_times(engine: CudnnEngine, batch: int) -> list[LayerTime]:
    """Measure every step of a batch size by itself, NMS the last."""
    *times, nms_time = step_times(engine, batch)
    peak = _peak(engine)
    program, graph = engine.programs[batch], engine.graph
    found = []
    for step, ms in zip(program.steps, times, strict=True):
        work = operations(graph, step.layers) * batch
        floor = None
        if peak is not None:
            moved = least_bytes(graph, step.layers, batch)
            floor = max(work / peak.tops / 1e9, moved / peak.terabytes / 1e9)
        found.append(_layer_time(step.name, step.candidate.name, ms, work, floor))
    heads = {head.tensor for head in graph.heads.values()}
    read = sum(
        2 * batch * t.channels * t.height * t.width for t in map(graph.tensors.__getitem__, heads)
    )
    floor = read / peak.terabytes / 1e9 if peak is not None else None
    return [*found, _layer_time(OP_TYPE, "libnms_opt.so", nms_time, 0, floor)]


def _layer_time(name: str, kernel: str, ms: float, work: int, floor: float | None) -> LayerTime:
    return LayerTime(name, kernel, ms, work / ms / 1e9, floor, floor and ms / floor)


def _peak(engine: CudnnEngine) -> Peak | None:
    return PEAKS.get(str(engine.manifest["gpu"]))


def _free_and_total_bytes() -> tuple[int, int]:
    error, free, total = runtime().cudaMemGetInfo()
    check((error,))
    return int(free), int(total)


def _print_layers(layers: Sequence[LayerTime]) -> None:
    from rich.table import Table

    table = Table("layer", "kernel", "ms", "TOPS", "floor", "ratio")
    for one in layers:
        floor = ["", ""] if one.floor_ms is None else [f"{one.floor_ms:.4f}", f"{one.ratio:.1f}"]
        table.add_row(one.name, one.kernel, f"{one.ms:.4f}", f"{one.tops:.0f}", *floor)
    table.add_row("sum", "", f"{sum(one.ms for one in layers):.3f}", "", "", "")
    new_console(markup=False).print(table)

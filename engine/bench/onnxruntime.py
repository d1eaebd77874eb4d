"""ONNX Runtime on this GPU, three ways: ``python -m engine.bench onnxruntime``.

For every model and batch size, in one run, on the same images: milliseconds a batch from images in
host memory to detections in host memory

* with NMS_OPT_TRT by libnms_opt.so, also under other options of the CUDA provider;
* with the function body of NMS_OPT_TRT in the same provider;
* on the CPU.

One way after the other, because each takes much of the GPU's memory; medians count. Besides, how
long a batch takes that is the first of its size, or follows one of another size, and which
detections are those of the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.backends.onnxruntime.cuda import CUDA_OPTIONS, SplitSession, load_split
from engine.backends.onnxruntime.engine import load_whole
from engine.backends.split import UnsplitError
from engine.data.matching import match_detections
from engine.data.preprocessed import load_preprocessed
from engine.errors import EngineError
from engine.protocol import Engine, InputSpec, Session
from engine.support.environment import circumstances, now
from engine.support.files import write_json

VARIANTS: Mapping[str, Mapping[str, str]] = {
    "split": {},
    "split, heuristic A": {"cudnn_conv_algo_search": "HEURISTIC"},
    "split, NHWC": {"prefer_nhwc": "1"},
    "split, fused bias": {"fuse_conv_bias": "1"},
    "split, NHWC, fused bias": {"prefer_nhwc": "1", "fuse_conv_bias": "1"},
}
"""Options of the CUDA provider on top of `CUDA_OPTIONS`."""

_WARM_UP = 3

Rows = tuple[NDArray[np.float32], NDArray[np.int32]]


def bench(
    models: Annotated[list[Path], typer.Argument(help="Surgered .onnx files, float or INT8.")],
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Images of 'harness preprocess', for each model.", show_default="noise"),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians count.")] = 20,
    cpu_rounds: Annotated[int, typer.Option(min=1, help="Turns of the CPU.")] = 1,
) -> None:
    """Measure ONNX Runtime with and without libnms_opt.so, and write the figures to a JSON file."""
    if data is not None and len(models) != len(data):
        raise EngineError(f"{len(models)} models, but {len(data)} folders of images")
    sizes = [int(size) for size in batches.split(",")]
    document: dict[str, Any] = {
        **circumstances("numpy", "onnx"),
        "models": {},
    }
    for index, model in enumerate(models):
        found = measure(model, data[index] if data else None, sizes, rounds, cpu_rounds)
        document["models"][model.name] = found
        for way, figures in found["ways"].items():
            text = ", ".join(f"{size}: {entry['ms']:.2f} ms" for size, entry in figures.items())
            typer.echo(f"{model.name}, {way}, batch {text}")
    write_json(output, document | {"finished": now()})


def measure(
    model: Path, folder: Path | None, sizes: Sequence[int], rounds: int, cpu_rounds: int
) -> dict[str, Any]:
    """Measure one model.

    Parameters
    ----------
    model
        Surgered ONNX file.
    folder
        Its preprocessed images; None: noise.
    sizes
        Batch sizes.
    rounds, cpu_rounds
        Turns on the GPU and on the CPU.

    Returns
    -------
    dict
        Manifest, and for every way and batch size: ``ms`` a batch; ``first_ms`` of the first one;
        ``return_ms`` of the first one after another size, when this size was there before;
        ``turns_ms``; the share of ``matched`` detections with the CPU.

    Raises
    ------
    EngineError
        When the model cannot be split or does not run.
    """
    spec = load_whole(model).input_spec
    images = {size: _images(spec, folder, size) for size in sizes}
    ways: dict[str, Callable[[], Engine]] = {
        "cpu": lambda: load_whole(model),
        "function body": lambda: load_whole(model, device="cuda"),
    }
    for name, options in VARIANTS.items():
        ways[name] = partial(load_split, model, options={**CUDA_OPTIONS, **options})
    found: dict[str, Any] = {"manifest": None, "ways": {}}
    expected: dict[int, Rows] = {}
    for name, load in ways.items():
        try:
            engine = load()
        except UnsplitError as error:
            raise EngineError(f"{model}: {error}") from error
        if name == "split":
            found["manifest"] = dict(engine.manifest)
        session = engine.session()
        figures, rows = _run(session, images, cpu_rounds if name == "cpu" else rounds)
        expected = expected or rows
        for size, entry in figures.items():
            entry["matched"] = _matched(rows[size], expected[size])
        found["ways"][name] = {str(size): entry for size, entry in figures.items()}
        if isinstance(session, SplitSession):
            session.close()
        del session, engine  # and its memory
    return found


def _run(
    session: Session, images: Mapping[int, NDArray[np.generic]], rounds: int
) -> tuple[dict[int, dict[str, Any]], dict[int, Rows]]:
    """Time every batch size, and keep the first rows of each."""
    figures: dict[int, dict[str, Any]] = {}
    rows: dict[int, Rows] = {}
    for size, batch in images.items():
        first, rows[size] = _timed(session, batch)
        for _ in range(min(_WARM_UP, rounds - 1)):
            session.infer(batch)
        turns = [_timed(session, batch)[0] for _ in range(rounds)]
        figures[size] = {"ms": statistics.median(turns), "first_ms": first, "turns_ms": turns}
    for size, batch in images.items():
        figures[size]["return_ms"], _ = _timed(session, batch)
    return figures, rows


def _images(spec: InputSpec, folder: Path | None, size: int) -> NDArray[np.generic]:
    if folder is None:
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((size, *spec.shape), np.float32)
        return noise if spec.scale is None else (noise * 40).clip(-127, 127).astype(np.int8)
    source = load_preprocessed(folder, spec)
    return source.load([index % len(source.files) for index in range(size)])


def _timed(session: Session, images: NDArray[np.generic]) -> tuple[float, Rows]:
    start = time.perf_counter()
    rows = session.infer(images)
    return 1e3 * (time.perf_counter() - start), rows


def _matched(actual: Rows, expected: Rows) -> float | None:
    """Share of the detections of both that have a partner; None where there are none."""
    pairs, total = 0, 0
    for rows, used, others, number in zip(*actual, *expected, strict=True):
        pairs += len(match_detections(others[:number], rows[:used]).pairs)
        total += int(used + number)
    return 2 * pairs / total if total else None

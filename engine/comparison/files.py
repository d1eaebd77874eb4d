"""`engine compare` from files to figures: sides, images, tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.comparison.compare import (
    FLOAT_TOLERANCE,
    INT8_TOLERANCE,
    Comparison,
    compare,
    load_truth,
)
from engine.comparison.runners import open_side
from engine.data.preprocessed import PreprocessedSet, load_preprocessed
from engine.errors import EngineError
from engine.protocol import InputSpec
from engine.support.documents import read_json
from engine.support.environment import command_line, commit, now
from engine.support.files import another, json_text, write_json
from engine.support.progress import progress_bar

_SEED = 0
_CIRCUMSTANCES = ("finished", "commit", "command")


def compare_files(
    first: Path,
    second: Path,
    *,
    data: Path | None,
    random: int | None,
    limit: int | None,
    annotations: Path | None,
    overrides: Mapping[str, float | None],
    backend: str = "onnxruntime",
    kept: Path | None = None,
) -> tuple[Comparison, dict[str, object]]:
    """Compare two files on preprocessed images or on noise.

    Parameters
    ----------
    first, second
        ``.onnx`` or engine files; the first is the reference.
    data
        Folder of float32 images.
    random
        Number of images of normal noise instead.
    limit
        Take the first so many images of `data`; None: all.
    annotations
        COCO annotations of the images of `data`.
    backend
        What runs the second file where it is an ONNX file; see
        `engine.comparison.runners.open_side`.
    overrides
        Fields of `engine.comparison.compare.Tolerance` to their value; None: the default.
    kept
        JSON file that may not be replaced: refused before the work where it is of anything else.

    Returns
    -------
    comparison
        The figures.
    document
        The same with what was compared, JSON-serialisable.

    Raises
    ------
    EngineError
        When the request makes no sense, a file is unusable, or the sides take images of different
        sizes.
    """
    if (data is None) == (random is None):
        raise EngineError("give either --data FOLDER or --random N")
    if data is None and (annotations is not None or limit is not None):
        raise EngineError("--annotations and --images go with --data, not with --random")
    a, b = open_side(first, f"A: {first}"), open_side(second, f"B: {second}", backend)
    shape = a.runner.spec.shape
    if shape != b.runner.spec.shape:
        raise EngineError(
            f"{first} takes images {list(shape)}, {second} {list(b.runner.spec.shape)}: "
            "these are different networks"
        )
    tolerance = replace(
        INT8_TOLERANCE if a.quantized or b.quantized else FLOAT_TOLERANCE,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    source, truth = None, None
    if data is not None:
        source = load_preprocessed(data, InputSpec(a.runner.spec.name, shape, "float32"))
        if limit is not None and limit > len(source.files):
            raise EngineError(f"{limit} images asked for, {data} has {len(source.files)}")
        files = source.files[:limit]
        if annotations is not None:
            truth = load_truth(annotations, files)
        images, count = _read(source, len(files)), len(files)
    else:
        count = random or 0
        images = _noise(count, shape)
    compared: dict[str, object] = {
        "first": {"file": str(first), **a.manifest},
        "second": {"file": str(second), **b.manifest},
        "data": None if data is None else str(data),
        "tolerance": asdict(tolerance),
        "images": count,
    }
    if kept is not None and kept.exists() and not _says(kept, compared):
        raise another(kept)
    with progress_bar("compare") as bar:
        progress = None if bar is None else lambda done: bar(done, count)
        found = compare(a.runner, b.runner, images, tolerance, truth=truth, progress=progress)
    document = {
        "finished": now(),
        "commit": commit(),
        "command": command_line(),
        **compared,
        **found.to_dict(),
    }
    return found, document


def save_comparison(output: Path, document: Mapping[str, object], *, overwrite: bool) -> bool:
    """Write the document of `compare_files`.

    Returns
    -------
    Whether it was written: a file with the same figures of the same is left.

    Raises
    ------
    EngineError
        When it cannot be written, or another file is there that may not be replaced.
    """
    if output.exists() and _says(output, document):
        return False
    if output.exists() and not overwrite:
        raise another(output)
    write_json(output, document)
    return True


def _says(path: Path, document: Mapping[str, object]) -> bool:
    """Whether a JSON file says what a document does, but for when and by which command."""
    try:
        known = read_json(path)
    except EngineError:
        return False
    wanted = json.loads(json_text(document))
    return isinstance(known, dict) and all(
        known.get(key) == value for key, value in wanted.items() if key not in _CIRCUMSTANCES
    )


def _read(source: PreprocessedSet, count: int) -> Iterator[NDArray[np.float32]]:
    for index in range(count):
        yield source.load([index])[0].astype(np.float32, copy=False)


def _noise(count: int, shape: tuple[int, int, int]) -> Iterator[NDArray[np.float32]]:
    random = np.random.default_rng(_SEED)
    for _ in range(count):
        yield random.standard_normal(shape, np.float32)

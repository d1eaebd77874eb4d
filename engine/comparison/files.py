"""`engine compare` from files to figures: sides, images, tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.comparison.compare import Comparison, Truth, compare, load_truth
from engine.comparison.runners import Opened, Side, find_side, open_side
from engine.comparison.tensors import shown
from engine.comparison.tolerance import FLOAT_TOLERANCE, INT8_TOLERANCE, SAME_INT8_TOLERANCE
from engine.data.preprocessed import PreprocessedSet, load_preprocessed
from engine.errors import EngineError
from engine.protocol import InputSpec, first_label
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
    source: Path | None = None,
    layers: bool = False,
    kept: Path | None = None,
) -> tuple[Comparison, dict[str, object]]:
    """Compare two files on preprocessed images or on noise.

    Where the second side is INT8 and not run by ONNX Runtime, its share of the difference is told
    apart: it is held against ONNX Runtime on the very same graph as well.

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
        `engine.comparison.runners.find_side`.
    source
        ONNX file that a plan was built from; None: it is looked for beside it.
    layers
        Compare the tensors between the layers as well.
    overrides
        Fields of `engine.comparison.tolerance.Tolerance` to their value; None: the default.
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
    sides = (
        find_side(first, f"A: {first}", source=source),
        find_side(second, f"B: {second}", backend, source),
    )
    tensors = _in_common(sides, layers=layers)
    own = sides[1].backend != "onnxruntime"  # what runs the second side rounds in its own way
    same = sides[0].sha256 is not None and sides[0].sha256 == sides[1].sha256
    a = open_side(sides[0], tensors[0], literally=own and same)
    b = open_side(sides[1], tensors[1])
    shape = a.runner.spec.shape
    if shape != b.runner.spec.shape:
        raise EngineError(
            f"{first} takes images {list(shape)}, {second} {list(b.runner.spec.shape)}: "
            "these are different networks"
        )
    quantized = any(side.quantized for side in sides) or "int8" in (
        a.runner.spec.dtype,
        b.runner.spec.dtype,
    )
    tolerance = FLOAT_TOLERANCE
    if quantized:
        tolerance = SAME_INT8_TOLERANCE if same else INT8_TOLERANCE
    given = {name: value for name, value in overrides.items() if value is not None}
    tolerance = replace(tolerance, **given)
    preprocessed, truth, count = None, None, random or 0
    if data is not None:
        preprocessed = load_preprocessed(data, InputSpec(a.runner.spec.name, shape, "float32"))
        if limit is not None and limit > len(preprocessed.files):
            raise EngineError(f"{limit} images asked for, {data} has {len(preprocessed.files)}")
        files = preprocessed.files[:limit]
        count = len(files)
        if annotations is not None:
            first_a, first_b = first_label(a.manifest), first_label(b.manifest)
            if first_a != first_b:
                raise EngineError(
                    f"labels of {first} count from {first_a}, those of {second} from {first_b}: "
                    "these are different networks"
                )
            truth = load_truth(annotations, files, first_a)

    def held(reference: Opened, truth: Truth | None, what: str) -> Comparison:
        images = _noise(count, shape) if preprocessed is None else _read(preprocessed, count)
        with progress_bar(what) as bar:
            progress = None if bar is None else lambda done: bar(done, count)
            runners = reference.runner, b.runner
            return compare(*runners, images, tolerance, truth=truth, progress=progress)

    compared: dict[str, object] = {
        "first": {"file": str(first), **a.manifest},
        "second": {"file": str(second), **b.manifest},
        "data": None if data is None else str(data),
        "tolerance": asdict(tolerance),
        "images": count,
    }
    if kept is not None and kept.exists() and not _says(kept, compared):
        raise another(kept)
    found = held(a, truth, "compare")
    if own and sides[1].quantized and not same and sides[1].detector is not None and tensors[1]:
        literal = replace(sides[1], path=sides[1].detector.path, backend="onnxruntime")
        alone = held(open_side(literal, tensors[1], literally=True), None, "the engine alone")
        found = replace(found, alone=alone.heads)
    document = {
        "finished": now(),
        "commit": commit(),
        "command": command_line(),
        **compared,
        **found.to_dict(),
    }
    return found, document


def _in_common(sides: tuple[Side, Side], *, layers: bool) -> list[dict[str, str]]:
    """Tensors that each side shows."""
    if not layers:
        return [shown(side.detector) for side in sides]
    for side in sides:
        if side.backend == "cudnn":
            raise EngineError("--layers: cudnn shows no tensor but the heads")
        if side.detector is None:
            raise EngineError(
                f"{side.path}: --layers needs the ONNX file that it was built from, which is not "
                "beside it; name it with --model"
            )
    both = [shown(side.detector, layers=True) for side in sides]
    common = [
        {role: name for role, name in one.items() if role in both[0].keys() & both[1].keys()}
        for one in both
    ]
    if not common[0]:
        raise EngineError("--layers: no tensor of one file is in the other")
    return common


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

"""Does one large file load faster than a file per image? ``python -m harness.bench loading``.

Preprocessed INT8 noise is loaded into memory as the query sample library does it, 64 images at a
time, from a .npy file per image (what `harness.data.preprocess` writes), and from one .npy file
with all images, read or mapped; with the files in the page cache, and after they were dropped from
it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.data.npy import npy_path, write_npy
from engine.data.preprocessed import PreprocessedSet
from engine.protocol import InputSpec
from engine.support.environment import circumstances, now
from engine.support.files import write_json
from harness.errors import HarnessError

_TOGETHER = 64  # samples that LoadGen has loaded together

_Images = NDArray[np.generic]
_Load = Callable[[Sequence[int]], _Images]


def bench(
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    *,
    images: Annotated[int, typer.Option(min=_TOGETHER, help="Images of a set.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians count.")] = 5,
) -> None:
    """Measure both sizes, 400x400 and 1200x1200, and write the figures to a JSON file."""
    document: dict[str, Any] = {
        **circumstances(),
        "images": images,
        "loaded_together": _TOGETHER,
        "sizes": {},
    }
    for size in (400, 1200):
        with tempfile.TemporaryDirectory() as folder:
            spec = InputSpec("image", (3, size, size), "int8", 1 / 48)
            document["sizes"][f"{size}x{size}"] = measure(Path(folder), spec, images, rounds)
    document["finished"] = now()
    write_json(output, document)
    for size, figures in document["sizes"].items():
        typer.echo(f"{size}: {figures['milliseconds_per_image']}")


def measure(folder: Path, spec: InputSpec, count: int, rounds: int) -> dict[str, object]:
    """Milliseconds per image of every way to load, in both states of the page cache.

    A round loads the first images, as a performance run does, and as many of all others, in turns.
    """
    files = tuple(f"{number:05}.jpg" for number in range(count))
    whole = folder / "images.npy"
    _write(folder, whole, files, spec)
    ways: dict[str, _Load] = {
        "file per image": PreprocessedSet(folder, files, spec, {}).load,
        "one file, read": _Reader(whole, spec),
        "one file, mapped": lambda indices: np.load(whole, mmap_mode="r")[list(indices)],
    }
    paths = [whole, *(npy_path(folder, name) for name in files)]
    random = np.random.default_rng(1)
    seconds: dict[str, dict[str, list[float]]] = {
        way: {"cached": [], "dropped": []} for way in ways
    }
    for number in range(rounds + 1):  # the first is not counted
        chosen = random.permutation(count)[:_TOGETHER] if number % 2 else np.arange(_TOGETHER)
        expected = ways["file per image"](chosen.tolist())
        for way in random.permutation(list(ways)):
            for state in ("dropped", "cached"):
                if state == "dropped":
                    _drop(paths)
                start = time.perf_counter()
                batch = ways[way](chosen.tolist())
                took = time.perf_counter() - start
                if number:
                    seconds[way][state].append(took)
                if not np.array_equal(batch, expected):
                    raise HarnessError(f"{way} loads other images")
    return {
        "megabytes_per_image": float(np.prod(spec.shape)) / 1e6,
        "milliseconds_per_image": {
            way: {
                state: round(1000 * statistics.median(times) / _TOGETHER, 3)
                for state, times in states.items()
            }
            for way, states in seconds.items()
        },
        "seconds": seconds,
    }


class _Reader:
    """Reads images of one .npy file straight into their places in a batch."""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        self._path, self._spec = path, spec
        self._offset = np.load(path, mmap_mode="r").offset

    def __call__(self, indices: Sequence[int]) -> _Images:
        batch = np.empty((len(indices), *self._spec.shape), self._spec.dtype)
        with self._path.open("rb", buffering=0) as file:
            for image, index in zip(batch, indices, strict=True):
                start = self._offset + index * image.nbytes
                os.preadv(file.fileno(), [image.data.cast("B")], start)
        return batch


def _write(folder: Path, whole: Path, files: Sequence[str], spec: InputSpec) -> None:
    random = np.random.default_rng(0)
    shape = (len(files), *spec.shape)
    mapped = np.lib.format.open_memmap(whole, "w+", np.dtype(spec.dtype), shape)
    for index, name in enumerate(files):
        image = random.integers(-127, 128, spec.shape, np.int8)
        mapped[index] = image
        write_npy(npy_path(folder, name), image, spec)
    mapped.flush()


def _drop(paths: Sequence[Path]) -> None:
    """Ask the system to forget the content of files."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

"""The fastest of what can run an ONNX file on this machine, by a measurement that is remembered."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import EngineError
from engine.load import ONNX_BACKENDS, load_engine
from engine.manifest import load_manifest
from engine.speed import throughput
from engine.support.documents import read_as
from engine.support.external import model_sha256
from engine.support.files import write_json

if TYPE_CHECKING:
    from engine.model import Detector

_SECONDS = 1.0
"""Of a measurement, after three batches."""

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "nvidia-cudnn-cu13", "tensorrt", "tensorrt-rtx")
"""Of which a measurement is out of date when their version changes."""


@dataclass(frozen=True)
class Way:
    """A way to run a file.

    Attributes
    ----------
    backend
        Name for `engine.load.load_engine`.
    file
        The ONNX file, or a plan of it.
    device
        ``cpu`` or ``cuda:N``.
    """

    backend: str
    file: str
    device: str

    def __str__(self) -> str:
        """Return it as a user reads it."""
        return f"{self.backend} on {self.device} ({self.file})"


@dataclass(frozen=True)
class Measured:
    """How fast a way was.

    Attributes
    ----------
    way
        The way.
    images_per_s
        With batches one after the other in flight; None: it cannot run here.
    refusal
        Why it cannot.
    """

    way: Way
    images_per_s: float | None
    refusal: str | None = None


@dataclass(frozen=True)
class Choice:
    """What was measured.

    Attributes
    ----------
    key
        Of what: GPU, files, batch and versions; one that differs is out of date.
    measured
        The ways, fastest first.
    """

    key: dict[str, str]
    measured: tuple[Measured, ...]

    @property
    def fastest(self) -> Way:
        """The fastest way.

        Raises
        ------
        EngineError
            When none can run.
        """
        best = self.measured[0]
        if best.images_per_s is None:
            raise EngineError(f"nothing here runs the file: {best.way}: {best.refusal}")
        return best.way


@dataclass(frozen=True)
class _Memory:
    choices: tuple[Choice, ...] = ()


def choose(
    detector: Detector, batch: int, device: str | None, folder: Path, threads: int | None = None
) -> tuple[Choice, bool]:
    """Find the fastest way to run a detector: ONNX Runtime, cuDNN, or a plan of it that is there.

    Nothing is built. Plans are looked for beside the file and in `folder`.

    Parameters
    ----------
    detector
        The ONNX file.
    batch
        Images of a batch.
    device
        ``cpu``, ``cuda`` or ``cuda:N``; None: the first GPU and the CPU.
    folder
        Of built engines. Measurements are kept there, in auto.json.
    threads
        CPU threads; see `engine.load.load_engine`.

    Returns
    -------
    choice
        The ways, fastest first.
    remembered
        Whether they were measured before.

    Raises
    ------
    EngineError
        When the file is no detector, or what was remembered cannot be read or written.
    """
    ways = list(_ways(detector, device, folder))
    key = {
        "model": detector.sha256,
        "batch": str(batch),
        "threads": str(threads),
        "gpu": _gpu(ways[-1].device),
        **{str(way): model_sha256(Path(way.file)) for way in ways},
        **{name: _version(name) for name in _PACKAGES},
    }
    path = folder / "auto.json"
    known = read_as(_Memory, path, "remove it") if path.exists() else _Memory()
    for choice in known.choices:
        if choice.key == key and not any(one.refusal for one in choice.measured):
            return choice, True  # what could not run may run now
    found = [_measure(way, batch, threads) for way in ways]
    found.sort(key=lambda one: -(one.images_per_s or 0.0))
    choice = Choice(key, tuple(found))
    same = {"model": key["model"], "batch": key["batch"], "threads": key["threads"]}
    kept = [one for one in known.choices if not same.items() <= one.key.items()]
    write_json(path, asdict(_Memory((*kept, choice))))
    return choice, False


def _ways(detector: Detector, device: str | None, folder: Path) -> Iterator[Way]:
    file = str(detector.path)
    if device in (None, "cpu"):
        yield Way("onnxruntime", file, "cpu")
    if device == "cpu":
        return
    gpu = "cuda:0" if device in (None, "cuda") else device
    for backend in ONNX_BACKENDS:
        if backend != "cudnn" or detector.quantized:
            yield Way(backend, file, gpu)
    for place in dict.fromkeys((detector.path.parent.resolve(), folder.resolve())):
        for manifest in sorted(place.glob("*.json")):
            engine = manifest.with_suffix("")
            if engine.suffix in ("", ".onnx") or not engine.is_file():
                continue
            try:
                known = load_manifest(engine)
            except EngineError:  # another JSON file
                continue
            if known.onnx_sha256 == detector.sha256:
                yield Way(known.backend, str(engine), gpu)


def _measure(way: Way, batch: int, threads: int | None) -> Measured:
    try:
        engine = load_engine(
            way.backend, Path(way.file), device=way.device, threads=threads, max_batch=batch
        )
        if engine.max_batch is not None and engine.max_batch < batch:
            raise EngineError(f"takes {engine.max_batch} images at most")
        # on a CPU an image takes its time alone as well, and a batch of them minutes
        size = (engine.max_batch or 1) if way.device == "cpu" else batch
        images = engine.host_array((size, *engine.input_spec.shape), engine.input_spec.dtype)
        random = np.random.default_rng(0)
        images[:] = random.integers(-60, 61, images.shape, np.int8)
        session = engine.session()
        try:
            found = throughput(session, images, size, _SECONDS)["images_per_s"]
        finally:
            session.close()
    except EngineError as error:
        return Measured(way, None, str(error))
    finally:
        gc.collect()  # the memory of its GPU
    return Measured(way, found)


def _gpu(device: str) -> str:
    from engine.backends.cuda import gpu_index, use_gpu

    index = gpu_index(device)
    try:
        return "none" if index is None else use_gpu(index).name
    except EngineError:
        return "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"

"""The manifest beside a built engine: what it was built from, with what, and for which GPU."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from engine.errors import EngineError
from engine.protocol import InputSpec, output_shapes
from engine.support.documents import read_as
from engine.support.files import another, file_sha256, write_atomically
from graph_surgery.kinds import other_kind

AMPERE = (8, 0)
"""Oldest compute capability that a hardware-compatible plan runs on (TensorRT's AMPERE_PLUS)."""

KEEP_TOP_K = 200
"""Detections of an image, the benchmark's, where a manifest from before does not say them."""

_TOO_MANY = 2**31  # TensorRT's sizes are int32

_REBUILD = "build it again with 'engine build --force'"


@dataclass(frozen=True)
class PluginLibrary:
    """A plugin library that an engine was built with.

    Attributes
    ----------
    path
        Relative to the engine's folder, so that both can move together.
    sha256
        Of its content.
    headers
        TensorRT whose headers it was built with, as ``10.14.1``; None: it does not say.
    """

    path: str
    sha256: str
    headers: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What an engine file is.

    Attributes
    ----------
    backend, version
        Builder and its version: ``tensorrt`` or ``tensorrt-rtx``.
    gpu
        Name of the GPU it was built on; None when it was built ahead of time.
    compute_capabilities
        Where it runs, as ``8.9``: of that GPU, or the targets of an ahead-of-time build; empty for
        the portable default of TensorRT-RTX.
    model, onnx_sha256
        Name and content of the ONNX file.
    plugins
        Libraries to load before the engine.
    metadata
        Metadata of the ONNX file: among others the hashes of its calibration.
    engine_sha256, engine_bytes
        Content and size of the engine file.
    input
        Image tensor that it takes.
    min_batch, opt_batch, max_batch
        Its optimisation profile.
    options
        The other build options that were set.
    seconds
        Parsing and building.
    keep_top_k
        Rows of ``detections`` for each image.
    outputs
        Output to its shape for one image.
    first_label
        Label of the first class; 1, too, in manifests from before, which do not say it.
    structure_sha256
        Of the ONNX file, see `engine.model.Detector.structure_sha256`; empty in manifests from
        before.
    """

    backend: str
    version: str
    gpu: str | None
    compute_capabilities: tuple[str, ...]
    model: str
    onnx_sha256: str
    plugins: tuple[PluginLibrary, ...]
    metadata: Mapping[str, str]
    engine_sha256: str
    engine_bytes: int
    input: InputSpec
    min_batch: int
    opt_batch: int
    max_batch: int
    options: Mapping[str, object]
    seconds: float
    keep_top_k: int = KEEP_TOP_K
    outputs: Mapping[str, list[int | None]] = field(
        default_factory=lambda: output_shapes(KEEP_TOP_K)
    )
    first_label: int = 1
    structure_sha256: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return the content of the JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class Machine:
    """Where an engine is about to run: backend, its version, GPU name, compute capability."""

    backend: str
    version: str
    gpu: str
    compute_capability: str


def manifest_path(engine: Path) -> Path:
    """Return where the manifest of an engine file lies: ``model.engine`` has model.engine.json."""
    return engine.with_name(f"{engine.name}.json")


def _pair(engine: Path) -> tuple[Path, Path]:
    return engine, manifest_path(engine)


def save_engine(engine: Path, plan: bytes | memoryview, manifest: Manifest) -> None:
    """Write an engine file and its manifest.

    Raises
    ------
    EngineError
        When a file cannot be written; what was there stays.
    """
    text = json.dumps(manifest.to_dict(), indent=2) + "\n"
    written = {path: path.with_name(f"{path.name}.{os.getpid()}.new.tmp") for path in _pair(engine)}
    try:
        for path, content in zip(written.values(), (plan, text.encode()), strict=True):
            write_atomically(path, content)
        manifest_path(engine).unlink(missing_ok=True)  # never a manifest beside another engine
        for path, temporary in written.items():
            temporary.replace(path)
    except OSError as error:
        raise EngineError(f"{engine}: cannot write it: {error.strerror}") from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def same_engine(engine: Path, manifest: Manifest) -> Manifest | None:
    """Look for an engine that was built from the same, by the same, for the same.

    Parameters
    ----------
    manifest
        What would be written, but for what only building tells: the plan's hash and size, the time.

    Returns
    -------
    Manifest or None
        That of the engine which is there; None when there is nothing.

    Raises
    ------
    EngineError
        When another one is there, or a manifest without its engine.
    """
    present = [path for path in _pair(engine) if path.exists()]
    if not present:
        return None
    try:
        found = load_manifest(engine)
        check_engine(engine, found)
    except EngineError as error:
        raise another(present[0]) from error
    built = {name: getattr(found, name) for name in ("engine_sha256", "engine_bytes", "seconds")}
    if json.dumps(found.to_dict()) != json.dumps(replace(manifest, **built).to_dict()):
        raise another(engine)
    return found


def load_manifest(engine: Path) -> Manifest:
    """Read the manifest of an engine file.

    Raises
    ------
    EngineError
        When there is none, or it is not one.
    """
    path = manifest_path(engine)
    if path.exists():
        manifest = read_as(Manifest, path, _REBUILD)
        batches = [manifest.min_batch, manifest.opt_batch, manifest.max_batch]
        sizes = [*manifest.input.shape, *batches, manifest.keep_top_k]
        scale = manifest.input.scale
        if (
            not 1 <= min(sizes) <= max(sizes) < _TOO_MANY
            or batches != sorted(batches)
            or manifest.first_label not in (0, 1)
            or (manifest.input.dtype == "int8") is not (scale is not None and 0 < scale < math.inf)
        ):
            raise EngineError(
                f"{path}: no engine has this input, these batches, this keep_top_k or first_label: "
                f"{manifest.input.dtype} {sizes}, scale {scale}, {manifest.first_label}; {_REBUILD}"
            )
        return manifest
    if engine.is_dir():
        raise EngineError(f"{engine}: a folder, no model or engine file")
    if not engine.is_file():
        raise EngineError(f"{engine}: no such engine file")
    if what := other_kind(engine):
        note = "" if "checkpoint" in what else f"; no manifest {path.name} beside it"
        raise EngineError(f"{engine}: no model or engine{what}{note}")
    raise EngineError(
        f"{engine}: no manifest {path.name} beside it; an engine is loaded only with the "
        "manifest that 'engine build' writes"
    )


def check_engine(engine: Path, manifest: Manifest) -> bytes:
    """Read an engine file and check that it is the one of the manifest.

    Raises
    ------
    EngineError
        When the file is missing, truncated or another one.
    """
    try:
        plan = engine.read_bytes()
    except OSError as error:
        raise EngineError(f"{engine}: cannot read it: {error.strerror}") from error
    if len(plan) != manifest.engine_bytes:
        kind = "truncated" if len(plan) < manifest.engine_bytes else "not the engine"
        raise EngineError(
            f"{engine}: {kind}: it has {len(plan)} bytes, its manifest says "
            f"{manifest.engine_bytes}; {_REBUILD}"
        )
    if hashlib.sha256(plan).hexdigest() != manifest.engine_sha256:
        raise EngineError(f"{engine}: engine_sha256 of its manifest is another; {_REBUILD}")
    return plan


def check_machine(engine: Path, manifest: Manifest, here: Machine) -> None:
    """Check that an engine can run here, and say which line of its manifest differs.

    A hardware-compatible engine runs on any GPU from `AMPERE` on, a version-compatible one with
    later releases of the same major version.

    Raises
    ------
    EngineError
        When the backend, its version, or the GPU differs.
    """
    _same(engine, "backend", manifest.backend, here.backend)
    if not manifest.options.get("version_compatible"):
        _same(engine, "version", manifest.version, here.version)
    else:
        built, installed = _numbers(manifest.version), _numbers(here.version)
        if built[0] != installed[0] or built > installed:
            _same(engine, "version", manifest.version, here.version)
    if manifest.options.get("hardware_compatible"):
        if _numbers(here.compute_capability) < AMPERE:
            _same(engine, "compute_capabilities", "8.0 or later", here.compute_capability)
        return
    targets = manifest.compute_capabilities
    if targets and here.compute_capability not in targets:
        _same(engine, "compute_capabilities", ", ".join(targets), here.compute_capability)
    if manifest.gpu is not None:
        _same(engine, "gpu", manifest.gpu, here.gpu)


def plugin_library(engine: Path, library: Path, headers: str | None = None) -> PluginLibrary:
    """Describe a plugin library for the manifest of an engine; see `PluginLibrary`."""
    relative = os.path.relpath(library.resolve(), engine.resolve().parent)
    return PluginLibrary(relative, file_sha256(library), headers)


def check_plugins(engine: Path, manifest: Manifest) -> tuple[Path, ...]:
    """Find the plugin libraries of an engine and check their content.

    Raises
    ------
    EngineError
        When one is missing or another one.
    """
    libraries = []
    for plugin in manifest.plugins:
        path = (engine.resolve().parent / plugin.path).resolve()
        if not path.is_file():
            raise EngineError(f"{engine}: its plugin library {path} is missing; build the plugin")
        if file_sha256(path) != plugin.sha256:
            raise EngineError(
                f"{engine}: its plugin library {path} is not the one it was built with; {_REBUILD}"
            )
        libraries.append(path)
    return tuple(libraries)


def _same(engine: Path, line: str, built: str, here: str) -> None:
    if built != here:
        raise EngineError(f"{engine}: built for {line} {built}, here it is {here}; {_REBUILD}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())

"""System configurations: one TOML file in configs/ for each machine and benchmark.

A file says which machine it is for, and has a table for each version that ``--config_ver`` can
choose:

    [system]
    benchmark = "ssd-resnet34"
    gpu = "NVIDIA A100-SXM4-80GB"   # how the GPU's name begins; or cpu = "…", the processor's

    [default]              # engine, device, devices, threads, url, and harness/loadgen/settings.py
    engine = "tensorrt"
    device = "cuda"
    devices = [0, 1]       # or "all"

    [default.Offline]
    batch_size = 64
    target_qps = 960.0
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, NonNegativeInt, PositiveInt

from engine.load import BACKENDS
from engine.support.documents import checked, one_of, read_toml
from engine.support.environment import cpu_name, gpu_name
from harness.benchmarks import BENCHMARKS
from harness.data.dataset import SHIPPED
from harness.errors import HarnessError, as_harness_error
from harness.loadgen.settings import check_tables
from harness.results.devices import ALL, parse_devices

CONFIGS = Path("configs")
"""Folder of the files; relative to where the commands run, and to `SHIPPED` where none fits."""

DEFAULT_VERSION = "default"
VERSIONS = (DEFAULT_VERSION, "triton", "maxq")


def _distinct(devices: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(devices)) < max(1, len(devices)):
        raise ValueError("different GPUs as [0, 1]")
    return devices


Devices = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_distinct)]
Backend = Annotated[str, one_of(BACKENDS)]


@dataclass(frozen=True)
class Machine:
    """Which benchmark and machine a file is for.

    Attributes
    ----------
    benchmark
        As ``--benchmarks`` of make: ``ssd-resnet34``, ``retinanet`` and others.
    gpu, cpu
        How the GPU's, or the processor's, name begins; one of both.
    """

    benchmark: str
    gpu: str | None = None
    cpu: str | None = None

    def __post_init__(self) -> None:
        """Check that it is one of both."""
        if (self.gpu is None) == (self.cpu is None):
            raise ValueError("benchmark, and either gpu or cpu")


@dataclass(frozen=True)
class ConfigFile:
    """Content of a file: the machine, and the table of each of `VERSIONS` that it has."""

    system: Machine
    default: Mapping[str, Any] | None = None
    triton: Mapping[str, Any] | None = None
    maxq: Mapping[str, Any] | None = None

    @property
    def versions(self) -> dict[str, Mapping[str, Any]]:
        """The tables by their names."""
        tables = {version: getattr(self, version) for version in VERSIONS}
        return {version: table for version, table in tables.items() if table is not None}


@dataclass(frozen=True)
class SystemConfig:
    """How a benchmark runs on a machine.

    Attributes
    ----------
    name
        Name of the system: the file's, or the host's without a file.
    source
        The file; None: there is none for this machine, and the values are the program's own.
    engine
        As ``--engine`` of ``harness run``.
    device
        ``cpu``, ``cuda`` or ``cuda:N``. With the engine ``triton``, where the server that `make`
        writes a repository for runs the model.
    devices
        Numbers of the GPUs to use together, as ``[0, 1]``, or ``"all"``; None: `device` alone.
    threads
        CPU threads; None: one for each CPU.
    url
        ``HOST:PORT`` of each Triton server, with commas between; None: one is started here.
    serves
        What that server runs it with; None: TensorRT on ``cuda``, ONNX Runtime on ``cpu``, which,
        as cuDNN, is served by Triton's Python backend.
    tables
        Settings, see `harness.loadgen.settings.settings_from`.
    """

    name: str
    source: Path | None = None
    engine: Backend = "onnxruntime"
    device: str = "cpu"
    devices: Devices | None = None
    threads: PositiveInt | None = None
    url: str | None = None
    serves: Backend | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def builder(self) -> str:
        """The engine that the model file is built for; with ``triton``, the server's."""
        if self.engine != "triton":
            return self.engine
        if self.serves is not None:
            return self.serves
        return "onnxruntime" if self.device == "cpu" else "tensorrt"


ENGINE_KEYS = tuple(
    item.name for item in fields(SystemConfig) if item.name not in ("name", "source", "tables")
)
"""What a version says of the engine; its other keys are settings."""


def host_name() -> str:
    """Name of this machine, of a system without a configuration."""
    return platform.node() or "unknown"


def system_config(benchmark: str, version: str, name: str | None) -> SystemConfig:
    """Return the configuration of this machine, or of a named one.

    Parameters
    ----------
    benchmark
        Name of the benchmark.
    version
        One of `VERSIONS`.
    name
        Name of a file in `CONFIGS`, without ``.toml``, or the path of one, with it; None: the file
        whose ``gpu``, or else whose ``cpu`` is how this machine's begins, the longest if there are
        several.

    Raises
    ------
    HarnessError
        When there is no such file, it lacks the version, or it cannot be understood.
    """
    if name is not None and name.endswith(".toml"):
        return _named(Path(name), benchmark, version)
    folders = (CONFIGS, SHIPPED / CONFIGS)
    files = {p: read_config_file(p) for folder in folders for p in sorted(folder.glob("*.toml"))}
    fitting = {p: file for p, file in files.items() if file.system.benchmark == benchmark}
    if name is not None:
        named = next((p for p in fitting if p.stem == name), None)
        if named is None:
            raise HarnessError(
                f"no configuration {name!r} for {benchmark} in {CONFIGS}; there are: "
                f"{', '.join(dict.fromkeys(found.stem for found in fitting)) or 'none'}"
            )
        path = named
    else:
        here = {"gpu": gpu_name(), "cpu": cpu_name()}
        matches = (
            _match({p: file for p, file in fitting.items() if p.parent == folder}, key, here[key])
            for folder in folders
            for key in ("gpu", "cpu")
        )
        found = next(filter(None, matches), None)
        if found is None:
            if version == "triton":
                return SystemConfig(host_name(), engine="triton")
            if version != DEFAULT_VERSION:
                machine = here["gpu"] or here["cpu"] or "unknown"
                raise HarnessError(
                    f"no file in {CONFIGS} is for {benchmark} on {machine}, so "
                    f"--config_ver={version} has no meaning; `harness tune` writes one"
                )
            return SystemConfig(host_name())
        path = found
    return _config(path, files[path], version)


def config_of(path: Path, detector: str) -> SystemConfig | None:
    """Return the default version of a file; None where it has no [system], as one of settings.

    Raises
    ------
    HarnessError
        When it cannot be read or understood, or is for a benchmark of another detector.
    """
    with as_harness_error():
        document = read_toml(path)
    if "system" not in document:
        return None
    file = read_config_file(path)
    known = BENCHMARKS.get(file.system.benchmark)
    if known is not None and known.detector != detector:
        raise HarnessError(f"{path} is for {known.name}, and the model is of {detector}")
    return _config(path, file, DEFAULT_VERSION)


def _named(path: Path, benchmark: str, version: str) -> SystemConfig:
    file = read_config_file(path)
    if file.system.benchmark != benchmark:
        raise HarnessError(f"{path} is for {file.system.benchmark}, not for {benchmark}")
    return _config(path, file, version)


def named_configs(benchmark: str, key: str, name: str) -> list[Path]:
    """Files in `CONFIGS` for a benchmark on the machine of exactly this ``gpu`` or ``cpu``."""
    files = {path: read_config_file(path).system for path in sorted(CONFIGS.glob("*.toml"))}
    return [p for p, s in files.items() if (s.benchmark, getattr(s, key)) == (benchmark, name)]


def _config(path: Path, file: ConfigFile, version: str) -> SystemConfig:
    if version not in file.versions:
        raise HarnessError(f"{path} has no [{version}]; it has: {', '.join(file.versions)}")
    table = file.versions[version]
    where = f"{path} [{version}]: "
    settings = {key: value for key, value in table.items() if key not in ENGINE_KEYS}
    check_tables(settings, where)
    chosen = {key: value for key, value in table.items() if key in ENGINE_KEYS}
    if chosen.get("devices") == ALL:
        chosen["devices"] = parse_devices(ALL)
    document = {"name": path.stem, "source": str(path), "tables": settings, **chosen}
    with as_harness_error():
        return checked(SystemConfig, document, where)


def _match(files: Mapping[Path, ConfigFile], key: str, here: str | None) -> Path | None:
    """File for a GPU or processor, that with the longest beginning of its name."""
    if here is None:
        return None
    begins = {path: getattr(file.system, key) for path, file in files.items()}
    found = {
        path: len(name)
        for path, name in begins.items()
        if name is not None and here.startswith(name)
    }
    return max(found, key=lambda path: found[path], default=None)


def read_config_file(path: Path) -> ConfigFile:
    """Read a file, its [system] and its versions' names checked.

    Raises
    ------
    HarnessError
        When it cannot be read, or is no configuration.
    """
    with as_harness_error():
        return checked(ConfigFile, read_toml(path), f"{path}: ")

"""System configurations: one TOML file in configs/ for each machine and benchmark.

A file says which machine it is for, and has a table for each version that ``--config_ver`` can
choose:

    [system]
    benchmark = "ssd-resnet34"
    gpu = "NVIDIA A100-SXM4-80GB"   # how the GPU's name begins; or cpu = "…", the processor's

    [default]              # engine, device, devices, threads, url, and harness/loadgen/settings.py
    engine = "tensorrt"
    device = "cuda"
    devices = [0, 1]

    [default.Offline]
    batch_size = 64
    target_qps = 960.0
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.load import BACKENDS
from engine.support.environment import cpu_name, gpu_name
from harness.errors import HarnessError
from harness.loadgen.settings import check_tables

CONFIGS = Path("configs")
"""Folder of the files; relative to where the commands run, the repository root."""

DEFAULT_VERSION = "default"
VERSIONS = (DEFAULT_VERSION, "triton", "maxq")

ENGINE_KEYS = {
    "engine": str,
    "device": str,
    "devices": list,
    "threads": int,
    "url": str,
    "serves": str,
}
"""What a version says of the engine, and its type."""


@dataclass(frozen=True)
class SystemConfig:
    """How a benchmark runs on a machine.

    Attributes
    ----------
    name
        Name of the system: the file's, or that of the GPU or processor without a file.
    source
        The file; None: there is none for this machine, and the values are the program's own.
    engine, device, devices, threads
        See `harness.results.devices.load_engines`. With the engine ``triton``, where the server
        that `harness.make.targets` makes a repository for runs the model.
    url
        Triton servers, see `harness.results.devices.parse_urls`; None: one is started here.
    serves
        What that server runs it with; None: TensorRT on ``cuda``, ONNX Runtime on ``cpu``, which,
        as cuDNN, is served by Triton's Python backend.
    tables
        Settings, see `harness.loadgen.settings.settings_from`.
    """

    name: str
    source: Path | None = None
    engine: str = "onnxruntime"
    device: str = "cpu"
    devices: tuple[int, ...] | None = None
    threads: int | None = None
    url: str | None = None
    serves: str | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def builder(self) -> str:
        """The engine that the model file is built for; with ``triton``, the server's."""
        if self.engine != "triton":
            return self.engine
        if self.serves is not None:
            return self.serves
        return "onnxruntime" if self.device == "cpu" else "tensorrt"


def system_config(benchmark: str, version: str, name: str | None) -> SystemConfig:
    """Return the configuration of this machine, or of a named one.

    Parameters
    ----------
    benchmark
        Name of the benchmark.
    version
        One of `VERSIONS`.
    name
        Name of a file in `CONFIGS`, without ``.toml``; None: the file whose ``gpu``, or else whose
        ``cpu`` is how this machine's begins, the longest if there are several.

    Raises
    ------
    HarnessError
        When there is no such file, it lacks the version, or it cannot be understood.
    """
    files = {path: read_tables(path) for path in sorted(CONFIGS.glob("*.toml"))}
    fitting = {p: t for p, t in files.items() if t["system"]["benchmark"] == benchmark}
    if name is not None:
        path = CONFIGS / f"{name}.toml"
        if path not in fitting:
            raise HarnessError(
                f"no configuration {name!r} for {benchmark} in {CONFIGS}; there are: "
                f"{', '.join(found.stem for found in fitting) or 'none'}"
            )
    else:
        here = {"gpu": gpu_name(), "cpu": cpu_name()}
        found = next(
            filter(None, (_match(fitting, key, here[key]) for key in ("gpu", "cpu"))), None
        )
        if found is None:
            machine = here["gpu"] or here["cpu"] or "unknown"
            if version == "triton":
                return SystemConfig(machine, engine="triton")
            if version != DEFAULT_VERSION:
                raise HarnessError(
                    f"no file in {CONFIGS} is for {benchmark} on {machine}, so "
                    f"--config_ver={version} has no meaning; `harness tune` writes one"
                )
            return SystemConfig(machine)
        path = found
    tables = files[path]
    versions = [key for key in tables if key != "system"]
    if version not in tables:
        raise HarnessError(f"{path} has no [{version}]; it has: {', '.join(versions)}")
    return _config(path, version, tables[version])


def named_configs(benchmark: str, key: str, name: str) -> list[Path]:
    """Files in `CONFIGS` for a benchmark on the machine of exactly this ``gpu`` or ``cpu``."""
    files = {path: read_tables(path)["system"] for path in sorted(CONFIGS.glob("*.toml"))}
    return [p for p, s in files.items() if (s["benchmark"], s.get(key)) == (benchmark, name)]


def _config(path: Path, version: str, table: Mapping[str, Any]) -> SystemConfig:
    settings = {key: value for key, value in table.items() if key not in ENGINE_KEYS}
    check_tables(settings, f"{path} [{version}]")
    chosen = {key: value for key, value in table.items() if key in ENGINE_KEYS}
    for key, value in chosen.items():
        if type(value) is not ENGINE_KEYS[key] or value == 0:
            raise HarnessError(
                f"{path} [{version}]: {key} is {value!r}; a {ENGINE_KEYS[key].__name__} expected"
            )
    if "devices" in chosen:
        devices = chosen["devices"] = tuple(chosen["devices"])
        known = all(type(number) is int and number >= 0 for number in devices)
        if not known or len(set(devices)) < max(1, len(devices)):
            raise HarnessError(
                f"{path} [{version}]: devices are {list(devices)}; as [0, 1] expected"
            )
    for key in ("engine", "serves"):
        if chosen.get(key, BACKENDS[0]) not in BACKENDS:
            raise HarnessError(
                f"{path} [{version}] is for the engine {chosen[key]!r}, which is not among this "
                f"release's: {', '.join(BACKENDS)}"
            )
    return SystemConfig(path.stem, path, tables=settings, **chosen)


def _match(files: Mapping[Path, Mapping[str, Any]], key: str, here: str | None) -> Path | None:
    """File for a GPU or processor, that with the longest beginning of its name."""
    if here is None:
        return None
    found = {
        path: len(tables["system"][key])
        for path, tables in files.items()
        if here.startswith(tables["system"].get(key, "\n"))
    }
    return max(found, key=lambda path: found[path], default=None)


def read_tables(path: Path) -> dict[str, Any]:
    """Content of a file, its [system] and its versions' names checked.

    Raises
    ------
    HarnessError
        When it cannot be read, or is no configuration.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HarnessError(f"{path}: cannot read the configuration: {error}") from error
    system = tables.get("system")
    if (
        not isinstance(system, dict)
        or system.keys() not in ({"benchmark", "gpu"}, {"benchmark", "cpu"})
        or not all(isinstance(value, str) for value in system.values())
    ):
        raise HarnessError(f"{path}: [system] needs benchmark, and either gpu or cpu, as texts")
    for key, value in tables.items():
        if key != "system" and (key not in VERSIONS or not isinstance(value, dict)):
            raise HarnessError(
                f"{path}: {key!r} is unknown; known: [system], "
                f"{', '.join(f'[{version}]' for version in VERSIONS)}"
            )
    return tables

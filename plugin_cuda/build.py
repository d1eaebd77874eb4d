"""Build the libraries of kernels and of the TensorRT plugin with CMake and nvcc."""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plugin_cuda.errors import PluginError
from plugin_cuda.files import whole
from plugin_cuda.toolchain import (
    Nvcc,
    TensorRTHeaders,
    find_cmake,
    find_nvcc,
    find_tensorrt_headers,
    search_path,
)

KERNELS = "libnms_opt.so"
CONVOLUTIONS = "libint8_conv.so"
INT8_LAYERS = "libint8_layers.so"
PLUGIN = "libnmsoptplugin.so"
REGISTER = "libnmsoptplugin_register.so"

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
"""Compute capabilities of the default build, times ten, as far as nvcc knows them."""

CONVOLUTIONS_FOR = 90
"""The architecture that `CONVOLUTIONS` is written for."""

_SOURCES = Path(__file__).resolve().parent
_TREE = ".cmake"
"""Build tree, kept in the output folder, so that the next build is quick."""

_READ_ONCE = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
"""Environment variables that CMake reads for a new build tree alone."""


class CompileError(PluginError):
    """CMake or a compiler failed; `output` is what they said."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Plan:
    """What will be built, and with what.

    Attributes
    ----------
    output
        Folder of the libraries.
    nvcc, cmake
        The tools.
    headers
        TensorRT's; None: no plugin.
    real
        Compute capabilities, times ten, to make machine code for.
    virtual
        The one to add PTX for, which later GPUs compile themselves; None: none.
    """

    output: Path
    nvcc: Nvcc
    cmake: Path
    headers: TensorRTHeaders | None
    real: tuple[int, ...]
    virtual: int | None

    @property
    def libraries(self) -> tuple[str, ...]:
        """Names of the files."""
        names = [KERNELS, INT8_LAYERS]
        if CONVOLUTIONS_FOR in self.real:
            names.append(CONVOLUTIONS)
        if self.headers is not None:
            names += [PLUGIN, REGISTER]
        return tuple(names)

    @property
    def architectures(self) -> str:
        """The architectures in nvcc's words."""
        ptx = () if self.virtual is None else (f"compute_{self.virtual}",)
        return " ".join((*(f"sm_{number}" for number in self.real), *ptx))


def plan(output: Path, architectures: Sequence[int] | None) -> Plan:
    """Find the tools and settle the architectures.

    Parameters
    ----------
    output
        Folder of the libraries; made when it is missing.
    architectures
        Compute capabilities times ten; None: all of `ARCHITECTURES` that nvcc knows, and PTX of
        the newest.

    Raises
    ------
    PluginError
        When a tool is missing, nvcc does not know an architecture, or TENSORRT_INCLUDE_DIR is
        wrong.
    """
    nvcc, cmake = find_nvcc(), find_cmake()
    headers = find_tensorrt_headers()
    if architectures is None:
        real = tuple(number for number in ARCHITECTURES if number in nvcc.architectures)
        return Plan(output, nvcc, cmake, headers, real, max(real))
    if unknown := [number for number in architectures if number not in nvcc.architectures]:
        known = ", ".join(map(str, nvcc.architectures))
        raise PluginError(
            f"nvcc {nvcc.version} makes no code for architecture {unknown[0]}; it knows {known}"
        )
    return Plan(output, nvcc, cmake, headers, tuple(sorted(set(architectures))), None)


def build(plan: Plan) -> tuple[Path, ...]:
    """Build the libraries; what is up to date is left alone.

    Returns
    -------
    libraries
        In the output folder: `Plan.libraries`.

    Raises
    ------
    PluginError
        When the output folder cannot be written to.
    CompileError
        When CMake or a compiler fails.
    """
    tree = plan.output / _TREE
    try:
        tree.mkdir(parents=True, exist_ok=True)
        with (tree / "lock").open("w") as lock:  # another build into the same folder has to wait
            fcntl.flock(lock, fcntl.LOCK_EX)
            _configure(plan, tree)
            _run(plan, [plan.cmake, "--build", tree, "--parallel", str(os.cpu_count())])
            return tuple(_install(tree / name, plan.output / name) for name in plan.libraries)
    except OSError as error:
        raise PluginError(
            f"{plan.output}: cannot write the libraries there: {error.strerror or error}"
        ) from error


def _configure(plan: Plan, tree: Path) -> None:
    generator = "Ninja" if shutil.which("ninja", path=search_path()) else "Unix Makefiles"
    once = {name: os.environ.get(name) for name in _READ_ONCE}
    settings = json.dumps([str(_SOURCES), str(plan.nvcc.path), plan.nvcc.version, generator, once])
    known = tree / "settings.json"
    codes = [f"{number}-real" for number in plan.real]
    if plan.virtual is not None:
        codes.append(f"{plan.virtual}-virtual")
    command: list[str | Path] = [
        *(plan.cmake, "-S", _SOURCES, "-B", tree, "-G", generator),
        f"-DCMAKE_CUDA_COMPILER={plan.nvcc.path}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(codes)}",
        f"-DTENSORRT_INCLUDE_DIR={plan.headers.path if plan.headers else ''}",
    ]
    if not known.is_file() or known.read_text() != settings:
        known.unlink(missing_ok=True)
        command.append("--fresh")  # CMake keeps what it found out about other tools
    _run(plan, command)
    known.write_text(settings)


def _run(plan: Plan, command: Sequence[str | Path]) -> None:
    """Run CMake; nvcc of pip has its libraries where it does not look, so the linker is told."""
    libraries = [str(plan.nvcc.path.resolve().parent.parent / "lib")]
    if "LIBRARY_PATH" in os.environ:
        libraries.append(os.environ["LIBRARY_PATH"])
    environment = {
        **os.environ,
        "PATH": search_path(),
        "LIBRARY_PATH": os.pathsep.join(libraries),
    }
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env=environment,
    )
    if done.returncode:
        raise CompileError(
            f"the build with nvcc {plan.nvcc.version} ({plan.nvcc.path}) failed; the lines above "
            "say where",
            done.stdout,
        )


def _install(built: Path, target: Path) -> Path:
    """Put a library in place by a rename: a process that has it open keeps the old one."""
    if not (target.is_file() and filecmp.cmp(built, target, shallow=False)):
        with whole(target) as temporary:
            shutil.copy2(built, temporary)
    return target

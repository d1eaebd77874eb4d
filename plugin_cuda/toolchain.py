"""What a build needs from the machine: nvcc, CMake, TensorRT's headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from plugin_cuda.errors import PluginError

_CMAKE_VERSION = (3, 24)
_TENSORRT_MAJOR = 10
"""First major version whose registry loads a library by its getCreators."""

_RUNTIME_HEADER = "NvInferRuntime.h"
_INSTALL = "pip install 'ssd-resnet34-trt[plugin]'"
_TOOLKIT = Path("/usr/local/cuda/bin/nvcc")
_SYSTEM_HEADERS = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
    "/opt/tensorrt/include",
)
"""Where NVIDIA's packages and container images put NvInferRuntime.h."""


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes
    ----------
    path
        Its file.
    version
        As ``13.0``.
    architectures
        Compute capabilities it makes code for, times ten, ascending.
    """

    path: Path
    version: str
    architectures: tuple[int, ...]


@dataclass(frozen=True)
class TensorRTHeaders:
    """A folder with NvInferRuntime.h, and the version of TensorRT it belongs to, as ``10.14``."""

    path: Path
    version: str


def search_path() -> str:
    """PATH, and behind it the folder of this Python, where pip puts cmake and ninja."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def find_nvcc() -> Nvcc:
    """Find nvcc: CUDACXX, PATH, /usr/local/cuda, else NVIDIA's packages for pip.

    Raises
    ------
    PluginError
        When there is none, or what was found does not work.
    """
    named = os.environ.get("CUDACXX")
    path = _which(named or "nvcc")
    if named and path is None:
        raise PluginError(f"CUDACXX={named}: no such compiler; unset it, or name an nvcc")
    if path is None:
        places = (_TOOLKIT, *_pip_compilers())
        path = next((place for place in places if os.access(place, os.X_OK)), None)
    if path is None:
        raise PluginError(
            f"no CUDA compiler (nvcc) found; {_INSTALL}, or install the CUDA toolkit and put its "
            "bin folder on PATH"
        )
    release = re.search(r"release (\d+\.\d+)", _output(path, "--version"))
    codes = re.findall(r"^sm_(\d+)$", _output(path, "--list-gpu-code"), re.MULTILINE)
    if release is None or not codes:
        raise PluginError(f"{path} is no nvcc that works; set CUDACXX to one that does")
    return Nvcc(path, release[1], tuple(sorted(map(int, codes))))


def _pip_compilers() -> Iterator[Path]:
    """List nvcc of nvidia-cuda-nvcc; the namespace package nvidia is looked up, not imported."""
    spec = find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)


def find_cmake() -> Path:
    """Find CMake.

    Raises
    ------
    PluginError
        When there is none, or it is too old.
    """
    path, wanted = _which("cmake"), ".".join(map(str, _CMAKE_VERSION))
    if path is None:
        raise PluginError(f"CMake not found; {wanted} or later is needed: {_INSTALL}")
    version = re.search(r"cmake version (\d+)\.(\d+)", _output(path, "--version"))
    if version is None or tuple(map(int, version.groups())) < _CMAKE_VERSION:
        found = ".".join(version.groups()) if version else "of no version"
        raise PluginError(f"{path} is {found}; CMake {wanted} or later is needed: {_INSTALL}")
    return path


def find_tensorrt_headers() -> TensorRTHeaders | None:
    """Find TensorRT's headers: TENSORRT_INCLUDE_DIR, the package kernel-lens, system folders.

    Returns
    -------
    headers
        None when there are none of TensorRT 10 or later.

    Raises
    ------
    PluginError
        When TENSORRT_INCLUDE_DIR is no folder with such headers.
    """
    named = os.environ.get("TENSORRT_INCLUDE_DIR")
    if named:
        headers = _headers(Path(named))
        if headers is None:
            raise PluginError(
                f"TENSORRT_INCLUDE_DIR={named}: no {_RUNTIME_HEADER} of TensorRT "
                f"{_TENSORRT_MAJOR} or later there; name the folder that holds it, or unset it"
            )
        return headers
    spec = find_spec("kernel_lens")  # ships them; not imported, for it needs torch
    packaged = (spec and spec.submodule_search_locations) or ()
    folders = [Path(folder, "include", "tensorrt") for folder in packaged]
    found = (_headers(folder) for folder in (*folders, *map(Path, _SYSTEM_HEADERS)))
    return next((headers for headers in found if headers is not None), None)


def _headers(folder: Path) -> TensorRTHeaders | None:
    try:
        text = (folder / "NvInferVersion.h").read_text(errors="replace")
    except OSError:
        return None
    # 10.0 to 10.9 define NV_TENSORRT_MAJOR as a number, later ones through TRT_MAJOR_ENTERPRISE.
    parts = [
        re.search(rf"#define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text)
        for part in ("MAJOR", "MINOR")
    ]
    numbers = [part[1] for part in parts if part]
    if len(numbers) != 2 or int(numbers[0]) < _TENSORRT_MAJOR:
        return None
    if not (folder / _RUNTIME_HEADER).is_file():
        return None
    return TensorRTHeaders(folder.resolve(), ".".join(numbers))


def _which(name: str) -> Path | None:
    found = shutil.which(name, path=search_path())
    return Path(found).absolute() if found else None


def _output(program: Path, argument: str) -> str:
    """Return what a program prints; nothing when it fails."""
    try:
        done = subprocess.run([program, argument], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""

"""The parts of a TensorRT installation: which are here, and what the lack of one forbids."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backends.tensorrt.module import require_lean_runtime
from engine.backends.tensorrt.plugins import headers_version, version_text
from engine.errors import EngineError
from plugin_cuda.build import PLUGIN
from plugin_cuda.library import library_path

_RESOURCES = "libnvinfer_builder_resource"


@dataclass(frozen=True)
class Parts:
    """What was found.

    Attributes
    ----------
    found
        Parts and their versions, in words.
    lacking
        What is missing or does not fit, each with what it forbids.
    """

    found: tuple[str, ...]
    lacking: tuple[str, ...]


def find_parts(trt: Any, capability: str | None) -> Parts:
    """Look at what belongs to an imported ``tensorrt``; nothing is built or run.

    Parameters
    ----------
    trt
        The module that `engine.backends.tensorrt.module.import_tensorrt` returned.
    capability
        Compute capability of the GPU, as ``9.0``; None: there is none.
    """
    found, lacking = [f"bindings {trt.__version__}"], []
    library = loaded_library("libnvinfer.so")
    if library is None:
        return Parts(tuple(found), ("no libnvinfer in this process, so nothing works",))
    version = version_text(int(ctypes.CDLL(str(library)).getInferLibVersion()))
    found.append(f"libnvinfer {version} ({library})")
    if not str(trt.__version__).startswith(version):
        lacking.append(f"bindings {trt.__version__} with libnvinfer {version}: install one version")
    resources = sorted(set(_resources(library)))
    found.append(f"builder resources {', '.join(resources) or 'none'}")
    if not resources:
        lacking.append(f"no {_RESOURCES}, so 'engine build' fails")
    elif capability is not None and not _serves(resources, capability):
        lacking.append(f"no builder resources for {capability}, so 'engine build' fails or is slow")
    try:
        require_lean_runtime(trt)
        found.append("lean runtime")
    except EngineError:  # few need it
        found.append("no lean runtime (--version-compatible is refused)")
    plugin = library_path().with_name(PLUGIN)
    if not plugin.is_file():
        lacking.append(f"no {plugin}, so 'engine build' is refused: build-plugin")
    elif headers := headers_version(plugin):
        found.append(f"plugin for TensorRT {headers}")
        if headers.partition(".")[0] != version.partition(".")[0]:
            lacking.append(f"the plugin is for TensorRT {headers}, so it is refused: build-plugin")
    return Parts(tuple(found), tuple(lacking))


def loaded_library(name: str) -> Path | None:
    """Find a library of this process by the begin of its file name."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    paths = (Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if "/" in line)
    return next((path for path in paths if path.name.startswith(name)), None)


def _resources(library: Path) -> Iterator[str]:
    """Names of the builder's libraries of kernels, without what they have in common.

    One file for all GPUs, as up to 10.6, has no name of its own; later there is one for each
    architecture, and one of PTX.
    """
    folders = [str(library.parent), *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)]
    for folder in dict.fromkeys(filter(None, folders)):
        for path in Path(folder).glob(f"{_RESOURCES}*.so*"):
            yield (
                path.name.removeprefix(_RESOURCES).partition(".so")[0].strip("_") or "for all GPUs"
            )


def _serves(resources: list[str], capability: str) -> bool:
    return "for all GPUs" in resources or f"sm{capability.replace('.', '')}" in resources

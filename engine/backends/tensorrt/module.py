"""Import TensorRT or TensorRT-RTX, and point Polygraphy at the one that was asked for."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import EngineError, one_line

RTX = "tensorrt-rtx"

_MODULES = {"tensorrt": "tensorrt", RTX: "tensorrt_rtx"}

BACKENDS = tuple(_MODULES)
"""Names of the backends of the TensorRT family."""

_OLDEST = {"tensorrt": (10, 6), RTX: (1, 7)}
"""The oldest releases that were run."""

_INSTALL = {
    "tensorrt": "pip install tensorrt",
    RTX: "pip install 'ssd-resnet34-trt[rtx]'",
}

_links: list[tempfile.TemporaryDirectory[str]] = []
"""Folder of links that `_name_rtx_library` made; removed when the process ends."""


def import_tensorrt(backend: str) -> Any:
    """Import the Python module of a backend, once its packaging is put right.

    Parameters
    ----------
    backend
        One of `BACKENDS`.

    Returns
    -------
    module
        ``tensorrt`` or ``tensorrt_rtx``; Polygraphy's TensorRT loaders use the same one.

    Raises
    ------
    EngineError
        When it is not installed, too old, or the process uses the other one already.
    """
    if backend == RTX and not _links:
        _name_rtx_library()
    try:
        trt = import_module(_MODULES[backend])
    except (ImportError, OSError) as error:  # OSError: its libraries cannot be loaded
        raise EngineError(
            f"the engine {backend!r} needs {_MODULES[backend]}: {_INSTALL[backend]} "
            f"({one_line(error)})"
        ) from error
    version = tuple(int(part) for part in str(trt.__version__).split(".")[:2])
    if version < _OLDEST[backend]:
        oldest = ".".join(map(str, _OLDEST[backend]))
        raise EngineError(
            f"{_MODULES[backend]} {trt.__version__} is too old: {oldest} or later is needed; "
            f"{_INSTALL[backend]}"
        )
    _select_in_polygraphy(backend)
    return trt


def require_lean_runtime(trt: Any) -> None:
    """Load TensorRT's lean runtime, which the builder puts into a version-compatible plan.

    Raises
    ------
    EngineError
        When it is not installed.
    """
    with suppress(ImportError):
        import_module("tensorrt_lean")  # its package loads the library
    name = f"libnvinfer_lean.so.{str(trt.__version__).partition('.')[0]}"
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise EngineError(
            f"--version-compatible needs TensorRT's lean runtime, and {name} is not here: "
            f"pip install tensorrt-lean=={trt.__version__}"
        ) from error


def _name_rtx_library() -> None:
    """Let TensorRT-RTX find its own library under the name it asks for.

    The ONNX parser of TensorRT-RTX opens ``libtensorrt_rtx.so`` as soon as a plugin appears, but
    the wheel holds only ``libtensorrt_rtx.so.1``; the exception that follows ends the process. The
    parser looks in the folder it was loaded from (RPATH $ORIGIN), and the dynamic linker takes
    that folder as given, links unresolved. So both libraries are loaded here first, through links
    in a folder of ours that also has the missing name; the package then finds them loaded.

    Raises
    ------
    EngineError
        When the package was imported before, so that it is too late.
    """
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(spec.submodule_search_locations[0])
    core, parser = folder / "libtensorrt_rtx.so.1", folder / "libtensorrt_onnxparser_rtx.so.1"
    plain = core.with_suffix("")
    if plain.exists() or not (core.exists() and parser.exists()):
        return
    if "tensorrt_rtx_libs" in sys.modules:
        raise EngineError(
            "this process imported tensorrt_rtx before the engine could put its library names "
            "right; call engine.backends.tensorrt.module.import_tensorrt first"
        )
    links = tempfile.TemporaryDirectory(prefix="tensorrt-rtx-")
    _links.append(links)
    for name, library in ((core.name, core), (parser.name, parser), (plain.name, core)):
        Path(links.name, name).symlink_to(library)
    for library in (core, parser):
        ctypes.CDLL(str(Path(links.name, library.name)))


def _select_in_polygraphy(backend: str) -> None:
    """Choose the module that Polygraphy's loaders bind when they are first imported."""
    try:
        from polygraphy import config
    except ImportError as error:
        raise EngineError(
            f"the engine {backend!r} needs Polygraphy: pip install polygraphy"
        ) from error
    wanted = backend == RTX
    if wanted != config.USE_TENSORRT_RTX:
        if "polygraphy.backend.trt" in sys.modules:
            raise EngineError(
                "one process can use TensorRT or TensorRT-RTX, not both; run them one by one"
            )
        config.USE_TENSORRT_RTX = wanted

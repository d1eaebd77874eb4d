"""TensorRT plugin libraries: load them, and ask whether a plugin is registered."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError

if TYPE_CHECKING:
    import tensorrt

V3_CREATOR = "PLUGIN CREATOR_V3ONE"
"""Interface of a creator of IPluginV3, as TensorRT names it."""

_loaded: set[Path] = set()
"""Libraries of this process: a library registers its creators once."""


def load_plugins(trt: Any, libraries: Sequence[Path]) -> None:
    """Load plugin libraries into the registry of TensorRT.

    A library exports ``getCreators`` (facts of the interface: NvInferRuntimePlugin.h) and its
    creators make IPluginV3.

    Parameters
    ----------
    trt
        The module that `import_tensorrt` returned.
    libraries
        Shared libraries. One that is loaded already is skipped.

    Raises
    ------
    EngineError
        When a library is missing, cannot be loaded, exports no creators, or creators of another
        interface, or was built for another major version.
    """
    registry: tensorrt.IPluginRegistry = trt.get_plugin_registry()
    for library in libraries:
        path = library.resolve()
        if path in _loaded:
            continue
        _check_library(trt, library)
        before = {_identity(creator) for creator in registry.all_creators}
        handle = registry.load_library(str(path))
        # the list has no order, and load_library may make new objects for what was there
        creators = [one for one in registry.all_creators if _identity(one) not in before]
        if handle is None or not creators:
            raise EngineError(
                f"{library}: TensorRT {trt.__version__} registered none of its plugins; a plugin "
                "of that name is there already, or it was built for another TensorRT"
            )
        creator: tensorrt.IPluginCreatorV3One
        for creator in creators:
            kind = creator.interface_info.kind
            if kind != V3_CREATOR:
                registry.deregister_library(handle)
                raise EngineError(
                    f"{library}: its plugin {creator.name!r} has the interface {kind!r}, not "
                    f"{V3_CREATOR!r}; build it against IPluginV3"
                )
        _loaded.add(path)


def is_registered(trt: Any, name: str, version: str, namespace: str) -> bool:
    """Tell whether a plugin of this name, version and namespace can be created."""
    registry: tensorrt.IPluginRegistry = trt.get_plugin_registry()
    return registry.get_creator(name, version, namespace) is not None


def headers_version(library: Path) -> str | None:
    """Version of TensorRT whose headers a plugin library was built with, as ``10.14.1``.

    Returns
    -------
    str
        None when the library does not say: that of 'build-plugin' does.

    Raises
    ------
    EngineError
        When it is missing or cannot be loaded.
    """
    function = getattr(_open(library), "nmsOptTrtHeaders", None)
    if function is None:
        return None
    return version_text(int(function()))


def version_text(number: int) -> str:
    """Return a version as ``10.14.1``, from the number that getInferLibVersion() gives since 10."""
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _identity(creator: Any) -> tuple[str, str, str]:
    return creator.name, creator.plugin_version, creator.plugin_namespace


def _open(library: Path) -> ctypes.CDLL:
    if not library.is_file():
        raise EngineError(f"{library}: no such plugin library; make one with 'build-plugin'")
    try:
        return ctypes.CDLL(str(library.resolve()))
    except OSError as error:
        raise EngineError(f"{library}: cannot load the plugin library: {error}") from error


def _check_library(trt: Any, library: Path) -> None:
    if not hasattr(_open(library), "getCreators"):
        raise EngineError(
            f"{library}: exports no getCreators, so it is no plugin library for TensorRT 10 or "
            "later"
        )
    built, running = headers_version(library), str(trt.__version__)
    # TensorRT-RTX has versions of its own
    if trt.__name__ == "tensorrt" and built and _major(built) != _major(running):
        raise EngineError(
            f"{library}: built with the headers of TensorRT {built}, but TensorRT {running} runs "
            "here; set TENSORRT_INCLUDE_DIR to its headers and run 'build-plugin' again"
        )


def _major(version: str) -> str:
    return version.partition(".")[0]

"""libint8_layers.so by ctypes: what stands beside cuDNN's INT8 convolutions.

The caller owns all device memory and has checked that it is large enough. Nothing here allocates
or waits, so calls can be captured in a CUDA graph; they go to the thread's current device.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

from plugin_cuda.errors import PluginError

VERSION = 1
"""INT8_LAYERS_VERSION of the header that this module was written for."""


class _Shape(ctypes.Structure):
    _fields_ = tuple((f"field{index}", ctypes.c_int32) for index in range(12))


@dataclass(frozen=True)
class PackShape:
    """int8_layers_pack_shape."""

    batch: int
    channels: int
    height: int
    width: int
    rows: int
    columns: int
    depth: int
    block_rows: int
    block_columns: int
    first_row: int
    first_column: int


@dataclass(frozen=True)
class PoolShape:
    """int8_layers_pool_shape."""

    batch: int
    channels: int
    height: int
    width: int
    rows: int
    columns: int
    kernel_rows: int
    kernel_columns: int
    stride_rows: int
    stride_columns: int
    top: int
    left: int


def library_path() -> Path:
    """Where the library is looked for: the plugins folder under BUILD_DIR, as build-plugin does."""
    return Path(os.environ.get("BUILD_DIR") or "build") / "plugins" / "libint8_layers.so"


def pack(library: ctypes.CDLL, shape: PackShape, x: int, y: int, stream: int) -> None:
    """Enqueue int8_layers_pack on device addresses.

    Raises
    ------
    PluginError
        When the library or CUDA refuses it.
    """
    _check(library, library.int8_layers_pack(ctypes.byref(_Shape(*astuple(shape))), x, y, stream))


def max_pool(
    library: ctypes.CDLL, shape: PoolShape, multiplier: float, *, x: int, y: int, stream: int
) -> None:
    """Enqueue int8_layers_max_pool on device addresses.

    Raises
    ------
    PluginError
        When the library or CUDA refuses it.
    """
    to_c = ctypes.byref(_Shape(*astuple(shape)))
    _check(library, library.int8_layers_max_pool(to_c, multiplier, x, y, stream))


def load_library(path: Path | None = None) -> ctypes.CDLL:
    """Load libint8_layers.so; needs no GPU.

    Parameters
    ----------
    path
        The library; None: that of `library_path`.

    Raises
    ------
    PluginError
        When it is missing, cannot be loaded or is of another version.
    """
    return _load((path or library_path()).resolve())


@lru_cache
def _load(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise PluginError(f"{path} not found: build it with build-plugin")
    try:
        library = ctypes.CDLL(str(path))
        library.int8_layers_version.restype = ctypes.c_int32
        version = library.int8_layers_version()
        address, shape = ctypes.c_void_p, ctypes.POINTER(_Shape)
        library.int8_layers_status_string.argtypes = (ctypes.c_int32,)
        library.int8_layers_status_string.restype = ctypes.c_char_p
        library.int8_layers_pack.argtypes = (shape, address, address, address)
        library.int8_layers_pack.restype = ctypes.c_int32
        arguments = (shape, ctypes.c_float, address, address, address)
        library.int8_layers_max_pool.argtypes = arguments
        library.int8_layers_max_pool.restype = ctypes.c_int32
    except (OSError, AttributeError) as error:
        raise PluginError(
            f"{path} is no libint8_layers.so that can be loaded ({error}); build it with "
            "build-plugin"
        ) from error
    if version != VERSION:
        raise PluginError(
            f"{path} is of version {version}, this binding of {VERSION}: build it again with "
            "build-plugin"
        )
    return library


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        text = library.int8_layers_status_string(status).decode()
        raise PluginError(f"libint8_layers.so: {text}")

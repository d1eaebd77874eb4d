"""libint8_layers.so by ctypes: what stands beside cuDNN's INT8 convolutions.

The caller owns all device memory and has checked that it is large enough. Nothing here allocates
or waits, so calls can be captured in a CUDA graph; they go to the thread's current device.
"""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass
from pathlib import Path

from plugin_cuda.errors import PluginError
from plugin_cuda.library import library_path
from plugin_cuda.loader import load

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


def layers_library_path() -> Path:
    """Where libint8_layers.so is looked for: beside libnms_opt.so, see `library.library_path`."""
    return library_path().with_name("libint8_layers.so")


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


def load_layers_library() -> ctypes.CDLL:
    """Load libint8_layers.so from `layers_library_path`; needs no GPU.

    Raises
    ------
    PluginError
        When it is missing, cannot be loaded or is of another version.
    """
    remedy = "build it with build-plugin, into the folder of libnms_opt.so"
    return load(layers_library_path().resolve(), "int8_layers", VERSION, _declare, remedy)


def _declare(library: ctypes.CDLL) -> None:
    address, shape = ctypes.c_void_p, ctypes.POINTER(_Shape)
    library.int8_layers_status_string.argtypes = (ctypes.c_int32,)
    library.int8_layers_status_string.restype = ctypes.c_char_p
    library.int8_layers_pack.argtypes = (shape, address, address, address)
    library.int8_layers_pack.restype = ctypes.c_int32
    library.int8_layers_max_pool.argtypes = (shape, ctypes.c_float, address, address, address)
    library.int8_layers_max_pool.restype = ctypes.c_int32


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        text = library.int8_layers_status_string(status).decode()
        raise PluginError(f"libint8_layers.so: {text}")

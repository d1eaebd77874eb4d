"""libnms_opt.so by ctypes: the structures of nms_opt.h, and where the library is found."""

from __future__ import annotations

import ctypes
import operator
import os
from dataclasses import dataclass
from pathlib import Path

from plugin_cuda.errors import PluginError
from plugin_cuda.loader import load

VERSION = 2
"""NMS_OPT_VERSION of the header that this module was written for."""

MAX_LEVELS = 8
"""NMS_OPT_MAX_LEVELS."""

FLOAT32, FLOAT16, INT8 = range(3)
"""nms_opt_dtype."""

_INT32 = range(-(2**31), 2**31)


class _Format(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("vector", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class _Level(ctypes.Structure):
    _fields_ = (
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("anchors", ctypes.c_int32),
        ("loc", _Format),
        ("conf", _Format),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("num_levels", ctypes.c_int32),
        ("num_classes", ctypes.c_int32),
        ("background_class", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("keep_top_k", ctypes.c_int32),
        ("sigmoid", ctypes.c_int32),
        ("confidence_threshold", ctypes.c_float),
        ("nms_threshold", ctypes.c_float),
        ("level_top_k", ctypes.c_int32),
        ("clip_before_nms", ctypes.c_int32),
        ("bbox_xform_clip", ctypes.c_float),
        ("levels", _Level * MAX_LEVELS),
    )


@dataclass(frozen=True)
class Format:
    """nms_opt_format: element type and place of the channels; `scale` counts with INT8 alone."""

    dtype: int
    vector: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Level:
    """nms_opt_level: one feature map and its two head tensors."""

    height: int
    width: int
    anchors: int
    loc: Format
    conf: Format


@dataclass(frozen=True)
class Config:
    """nms_opt_config; the values are checked by the library."""

    num_classes: int
    background_class: int
    top_k: int
    keep_top_k: int
    confidence_threshold: float
    nms_threshold: float
    levels: tuple[Level, ...]
    sigmoid: int = 0
    level_top_k: int = 0
    clip_before_nms: int = 0
    bbox_xform_clip: float = 0.0

    @property
    def num_priors(self) -> int:
        """P: the priors of all levels."""
        return sum(level.anchors * level.height * level.width for level in self.levels)

    def to_c(self) -> ctypes.Structure:
        """Write the C structure.

        Raises
        ------
        PluginError
            For an integer that a C int32 does not hold.
        """
        return _Config(
            len(self.levels),
            int32(self.num_classes, "num_classes"),
            int32(self.background_class, "background_class"),
            int32(self.top_k, "top_k"),
            int32(self.keep_top_k, "keep_top_k"),
            int32(self.sigmoid, "sigmoid"),
            self.confidence_threshold,
            self.nms_threshold,
            int32(self.level_top_k, "level_top_k"),
            int32(self.clip_before_nms, "clip_before_nms"),
            self.bbox_xform_clip,
            # more levels than there is room for: the library refuses their number
            (_Level * MAX_LEVELS)(*map(_level_to_c, self.levels[:MAX_LEVELS])),
        )


def _level_to_c(level: Level) -> _Level:
    height, width = int32(level.height, "height"), int32(level.width, "width")
    anchors = int32(level.anchors, "anchors")
    return _Level(height, width, anchors, _format_to_c(level.loc), _format_to_c(level.conf))


def _format_to_c(form: Format) -> _Format:
    return _Format(int32(form.dtype, "dtype"), int32(form.vector, "vector"), form.scale)


def int32(value: int, name: str) -> int:
    """Check that ctypes will not cut an integer short."""
    number = operator.index(value)
    if number not in _INT32:
        raise PluginError(f"{name}={number} does not fit in 32 bits")
    return number


def library_path() -> Path:
    """Where libnms_opt.so is looked for.

    The environment variable NMS_OPT_LIBRARY; without it the file that build-plugin writes under
    BUILD_DIR.
    """
    named = os.environ.get("NMS_OPT_LIBRARY")
    build = Path(os.environ.get("BUILD_DIR") or "build")
    return Path(named) if named else build / "plugins" / "libnms_opt.so"


def load_library(path: Path | None = None) -> ctypes.CDLL:
    """Load libnms_opt.so; needs no GPU.

    Parameters
    ----------
    path
        The library; None: that of `library_path`.

    Raises
    ------
    PluginError
        When it is missing, cannot be loaded or is of another NMS_OPT_VERSION.
    """
    remedy = "build it with build-plugin, or set NMS_OPT_LIBRARY"
    return load((path or library_path()).resolve(), "nms_opt", VERSION, _declare, remedy)


def _declare(library: ctypes.CDLL) -> None:
    """Give the functions of nms_opt.h their types."""
    address, addresses = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    config, size = ctypes.POINTER(_Config), ctypes.c_size_t
    library.nms_opt_status_string.argtypes = (ctypes.c_int32,)
    library.nms_opt_status_string.restype = ctypes.c_char_p
    library.nms_opt_workspace_size.argtypes = (config, ctypes.c_int32, ctypes.POINTER(size))
    library.nms_opt_workspace_size.restype = ctypes.c_int32
    heads_and_rest = (addresses, addresses, address, address, address, address, size, address)
    library.nms_opt_run.argtypes = (config, ctypes.c_int32, *heads_and_rest)
    library.nms_opt_run.restype = ctypes.c_int32


def check(library: ctypes.CDLL, status: int) -> None:
    """Raise what a status other than NMS_OPT_OK says, as a PluginError."""
    if status:
        raise PluginError(f"NMS_OPT_TRT: {library.nms_opt_status_string(status).decode()}")


def workspace_size(config: Config, batch: int, library: ctypes.CDLL | None = None) -> int:
    """Bytes of device memory that a run of `batch` images needs.

    Raises
    ------
    PluginError
        With the library's own words when it does not take the configuration.
    """
    library = library or load_library()
    size = ctypes.c_size_t()
    to_c = ctypes.byref(config.to_c())
    check(library, library.nms_opt_workspace_size(to_c, int32(batch, "batch"), ctypes.byref(size)))
    return size.value

"""INT8 convolutions from Python: libint8_conv.so, for GPUs of compute capability 9.0.

    run = conv3x3(batch, height, width, 64, 64, x=..., weight=..., multiplier=..., bias=..., y=...)
    run(stream)

Tensors are device addresses; the caller owns their memory. Meaning and layouts: int8_conv.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from plugin_cuda.errors import PluginError
from plugin_cuda.library import int32, library_path
from plugin_cuda.loader import load

VERSION = 2
"""INT8_CONV_VERSION of the header that this module was written for."""

COMPUTE_CAPABILITY = "9.0"
"""Of the GPUs that the kernels are written for."""

CONV3X3_CHANNELS = {64: 64, 128: 128, 256: 64}
"""Of the input, and of what the output's are a multiple."""

STEM_CHANNELS = 64
STEM_MULTIPLE = 4
"""Of the stem's height and width."""


@dataclass(frozen=True)
class Run:
    """One ctypes call, its arguments made beforehand."""

    library: ctypes.CDLL
    function: str
    arguments: tuple[object, ...]

    def __call__(self, stream: int) -> None:
        """Enqueue a run on a stream, given as its cudaStream_t.

        Raises
        ------
        PluginError
            When the library or CUDA refuses it.
        """
        status = getattr(self.library, self.function)(*self.arguments, ctypes.c_void_p(stream))
        if status:
            reason = self.library.int8_conv_status_string(status).decode()
            raise PluginError(f"{self.function}: {reason}")


def conv_library_path() -> Path:
    """Where libint8_conv.so is looked for: beside libnms_opt.so, see `library.library_path`."""
    return library_path().with_name("libint8_conv.so")


def load_conv_library(path: Path | None = None) -> ctypes.CDLL:
    """Load libint8_conv.so; needs no GPU.

    Parameters
    ----------
    path
        The library; None: that of `conv_library_path`.

    Raises
    ------
    PluginError
        When it is missing, cannot be loaded or is of another INT8_CONV_VERSION.
    """
    remedy = "build it with build-plugin for architecture 90, into the folder of libnms_opt.so"
    return load((path or conv_library_path()).resolve(), "int8_conv", VERSION, _declare, remedy)


def _declare(library: ctypes.CDLL) -> None:
    integer, real, address = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
    library.int8_conv_status_string.argtypes = (integer,)
    library.int8_conv_status_string.restype = ctypes.c_char_p
    tensors = (address, address, address, address)
    library.int8_conv_3x3.argtypes = (*[integer] * 5, *tensors, address, real, address, address)
    library.int8_conv_3x3.restype = integer
    library.int8_conv_stem.argtypes = (*[integer] * 3, *tensors, real, address, address)
    library.int8_conv_stem.restype = integer


def conv3x3(
    batch: int,
    height: int,
    width: int,
    inputs: int,
    outputs: int,
    *,
    x: int,
    weight: int,
    multiplier: int,
    bias: int,
    y: int,
    residual: int | None = None,
    residual_multiplier: float = 0.0,
    library: ctypes.CDLL | None = None,
) -> Run:
    """Make the call of int8_conv_3x3: 3x3 convolution, stride 1, padding 1, residual, ReLU.

    Parameters
    ----------
    inputs, outputs
        Channels: one of `CONV3X3_CHANNELS`, and a multiple of its value.
    x, weight, multiplier, bias, y, residual
        Device addresses.
    library
        From `load_conv_library`; None: the one at `conv_library_path`.

    Raises
    ------
    PluginError
        When there is no library, or a size does not fit in 32 bits.
    """
    sizes = _sizes(batch=batch, height=height, width=width, inputs=inputs, outputs=outputs)
    arguments = (*sizes, x, weight, multiplier, bias, residual, residual_multiplier, y)
    return Run(library or load_conv_library(), "int8_conv_3x3", arguments)


def stem(
    batch: int,
    height: int,
    width: int,
    *,
    x: int,
    weight: int,
    multiplier: int,
    bias: int,
    pool_multiplier: float,
    y: int,
    library: ctypes.CDLL | None = None,
) -> Run:
    """Make the call of int8_conv_stem: 7x7 convolution of an image, ReLU, max pooling.

    Parameters
    ----------
    height, width
        Of the image; multiples of `STEM_MULTIPLE`.
    x, weight, multiplier, bias, y
        Device addresses; the weights as `stem_weight` arranges them.
    library
        From `load_conv_library`; None: the one at `conv_library_path`.

    Raises
    ------
    PluginError
        When there is no library, or a size does not fit in 32 bits.
    """
    sizes = _sizes(batch=batch, height=height, width=width)
    arguments = (*sizes, x, weight, multiplier, bias, pool_multiplier, y)
    return Run(library or load_conv_library(), "int8_conv_stem", arguments)


def stem_weight(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """Arrange the weights of the stem as the kernel reads them.

    Parameters
    ----------
    weight
        int8 [64, 3, 7, 7]: output channel, input channel, row, column.

    Returns
    -------
    arranged
        int8 [64, 4, 4, 16]: a pixel of half size holds 2x2 pixels of three channels and four
        zeros; the first row and the first column of the 8x8 filter are zero.

    Raises
    ------
    PluginError
        When the weights are not so.
    """
    if weight.dtype != np.int8 or weight.shape != (STEM_CHANNELS, 3, 7, 7):
        raise PluginError(
            f"stem weights are {weight.dtype} {list(weight.shape)}; int8 [{STEM_CHANNELS}, 3, 7, "
            "7] expected"
        )
    padded = np.pad(weight, ((0, 0), (0, 0), (1, 0), (1, 0)))
    split = padded.reshape(STEM_CHANNELS, 3, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5)
    arranged = np.zeros((STEM_CHANNELS, 4, 4, 16), np.int8)
    arranged[..., :12] = split.reshape(STEM_CHANNELS, 4, 4, 12)
    return arranged


def _sizes(**sizes: int) -> tuple[int, ...]:
    return tuple(int32(size, name) for name, size in sizes.items())

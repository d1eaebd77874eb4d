"""Tensors on a CUDA device, whoever made them: address, shape, type, strides."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plugin_cuda.errors import PluginError

_CUDA_DEVICES = (2, 13)  # kDLCUDA and kDLCUDAManaged of dlpack.h
_CPU_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost
_DLPACK_KINDS = {0: "i", 1: "u", 2: "f"}  # DLDataTypeCode


@dataclass(frozen=True)
class DeviceArray:
    """A tensor in the memory of a CUDA device.

    Attributes
    ----------
    pointer
        Address of the first element.
    shape
        Elements along each axis.
    dtype
        Of the elements.
    strides
        Bytes between neighbours along each axis, as in numpy; None: C-contiguous.
    device
        Number of the CUDA device; None: not known, and not checked.
    owner
        Whatever has to live as long as the memory.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...] | None = None
    device: int | None = None
    owner: object = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Bytes of the elements."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def element_strides(self) -> tuple[int, ...]:
        """Elements between neighbours along each axis."""
        if self.strides is not None:
            return tuple(stride // self.dtype.itemsize for stride in self.strides)
        return tuple(int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape)))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        expected = 1
        for length, stride in zip(
            reversed(self.shape), reversed(self.element_strides), strict=True
        ):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True


def device_array(tensor: object, name: str) -> DeviceArray:
    """Look at a tensor without copying it or waiting for its stream.

    Parameters
    ----------
    tensor
        A `DeviceArray`; or anything with ``__cuda_array_interface__`` (torch, cupy, numba) or
        DLPack's ``__dlpack__`` and ``__dlpack_device__``.
    name
        What to call the tensor in messages.

    Raises
    ------
    PluginError
        When it is none of these, or not in the memory of a CUDA device.
    """
    if isinstance(tensor, DeviceArray):
        array = tensor
    else:
        device = _dlpack_device(tensor, name)
        try:
            interface = getattr(tensor, "__cuda_array_interface__", None)
        except (RuntimeError, TypeError) as error:  # torch: needs a gradient, a type without name
            raise PluginError(f"{name}: {_first_line(error)}") from error
        if interface is not None:
            array = _from_interface(interface, device, tensor)
        elif device is not None:
            array = _from_dlpack(tensor, name, device)
        else:
            raise PluginError(
                f"{name}: a {type(tensor).__name__} is no tensor on a CUDA device; it has neither "
                "__cuda_array_interface__ nor __dlpack__"
            )
    if any(stride % array.dtype.itemsize for stride in array.strides or ()):
        raise PluginError(f"{name}: strides {array.strides} are not whole {array.dtype} elements")
    return array


def _from_interface(interface: dict[str, Any], device: int | None, owner: object) -> DeviceArray:
    """Read the CUDA Array Interface, version 2 or later."""
    strides = interface.get("strides")
    return DeviceArray(
        int(interface["data"][0] or 0),
        tuple(int(length) for length in interface["shape"]),
        np.dtype(interface["typestr"]),
        None if strides is None else tuple(int(stride) for stride in strides),
        device,
        owner,
    )


def _dlpack_device(tensor: object, name: str) -> int | None:
    """Return the CUDA device that DLPack names; None for an object without DLPack."""
    if not (hasattr(tensor, "__dlpack_device__") and hasattr(tensor, "__dlpack__")):
        return None
    kind, index = tensor.__dlpack_device__()
    if int(kind) not in _CUDA_DEVICES:
        where = "on the CPU" if int(kind) in _CPU_DEVICES else f"on a DLPack device {int(kind)}"
        raise PluginError(f"{name} is {where}, not on a CUDA device")
    return int(index)


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h, with its DLDevice and DLDataType laid out flat."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(tensor: Any, name: str, device: int) -> DeviceArray:
    """Read a DLPack capsule; it stays the owner and frees the export when it dies."""
    try:
        capsule = tensor.__dlpack__(stream=-1)  # -1: no synchronisation; the caller orders streams
        address = _capsule_pointer(capsule, b"dltensor")
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise PluginError(f"{name}: {_first_line(error)}") from error
    found = _DLTensor.from_address(address)
    if found.code not in _DLPACK_KINDS or found.lanes != 1 or found.bits % 8:
        raise PluginError(
            f"{name}: DLPack type (code {found.code}, {found.bits} bits, {found.lanes} lanes) is "
            "not supported"
        )
    dtype = np.dtype(f"{_DLPACK_KINDS[found.code]}{found.bits // 8}")
    shape = tuple(found.shape[: found.ndim])
    strides = (
        tuple(s * dtype.itemsize for s in found.strides[: found.ndim]) if found.strides else None
    )
    pointer = (found.data or 0) + found.byte_offset
    return DeviceArray(pointer, shape, dtype, strides, device, (capsule, tensor))


def _first_line(error: Exception) -> str:
    """Say what another library found, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def head_vector(array: DeviceArray, name: str) -> int:
    """Read from the strides how a head tensor [N, channels, height, width] lies in memory.

    Returns
    -------
    int
        `vector` of nms_opt_format: 1 for NCHW; for NHWC the elements from one cell to the next,
        that is the channels of a row with its padding.

    Raises
    ------
    PluginError
        When it is neither, by its name.
    """
    batch, channels, height, width = array.shape
    if array.is_contiguous:
        return 1
    image, channel, line, cell = array.element_strides
    if width > 1:
        row = cell
    elif height > 1:
        row = line
    else:
        row = image if batch > 1 else channels
    wanted = (height * width * row, 1, width * row, row)
    fits = all(
        length == 1 or stride == want
        for length, stride, want in zip(
            array.shape, (image, channel, line, cell), wanted, strict=True
        )
    )
    if not fits or row < channels:
        raise PluginError(
            f"{name} {list(array.shape)} has strides {list(array.element_strides)}: neither NCHW "
            "nor NHWC with rows of one length"
        )
    return row

"""A plugin library of TensorRT as TensorRT sees it; see plugin_driver.cpp."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, CHAR, DIMS, UNKNOWN, BF16, INT64 = range(11)
"""PluginFieldType."""

FLOAT, HALF, TYPE_INT8, TYPE_INT32 = range(4)
"""DataType."""

LINEAR, CHW2, HWC8, CHW4, CHW16, CHW32, DHWC8, CDHW32, HWC, DLA, DLA_HWC4, HWC16, DHWC = range(13)
"""TensorFormat."""


class Dims(ctypes.Structure):
    """nvinfer1::Dims."""

    _fields_ = (("nbDims", ctypes.c_int32), ("d", ctypes.c_int64 * 8))


class Desc(ctypes.Structure):
    """nvinfer1::PluginTensorDesc."""

    _fields_ = (
        ("dims", Dims),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class DynamicDesc(ctypes.Structure):
    """nvinfer1::DynamicPluginTensorDesc."""

    _fields_ = (("desc", Desc), ("min", Dims), ("max", Dims), ("opt", Dims))


class Field(ctypes.Structure):
    """nvinfer1::PluginField."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class Collection(ctypes.Structure):
    """nvinfer1::PluginFieldCollection."""

    _fields_ = (("nbFields", ctypes.c_int32), ("fields", ctypes.POINTER(Field)))


NUMPY = {FLOAT32: np.float32, INT32: np.int32, INT64: np.int64}


def dims(shape) -> Dims:
    return Dims(len(shape), (ctypes.c_int64 * 8)(*shape))


def desc(shape, kind=FLOAT, layout=LINEAR, scale=-1.0) -> Desc:
    """Describe a tensor; -1 is the scale of what has none."""
    return Desc(dims(shape), kind, layout, scale)


def dynamic(tensor: Desc, least, best, most) -> DynamicDesc:
    """Describe a tensor for a profile of batches."""
    shape = tensor.dims.d[1 : tensor.dims.nbDims]
    bounds = [dims([batch, *shape]) for batch in (least, most, best)]
    unknown = Desc(dims([-1, *shape]), tensor.type, tensor.format, tensor.scale)
    return DynamicDesc(unknown, *bounds)


def fixed(tensor: Desc) -> DynamicDesc:
    return DynamicDesc(tensor, tensor.dims, tensor.dims, tensor.dims)


def array(kind, items):
    return (kind * len(items))(*items)


def read_fields(collection) -> dict:
    """Read a collection: name to type and values, None without data."""
    result = {}
    for field in collection.contents.fields[: collection.contents.nbFields]:
        values = None
        if field.data:
            size = field.length * np.dtype(NUMPY[field.type]).itemsize
            values = np.frombuffer(ctypes.string_at(field.data, size), NUMPY[field.type]).tolist()
        result[field.name.decode()] = (field.type, field.length, values)
    assert len(result) == collection.contents.nbFields
    return result


class Driver:
    """The library of one path, and the calls of plugin_driver.cpp."""

    def __init__(self, driver: Path, library: Path) -> None:
        self.c, self.library = ctypes.CDLL(str(driver)), library
        pointers = ("create", "clone", "attach")
        for name in pointers:
            getattr(self.c, f"driver_{name}").restype = ctypes.c_void_p
        for name in ("messages", "creator_says", "plugin_says"):
            getattr(self.c, f"driver_{name}").restype = ctypes.c_char_p
        for name in ("field_names", "fields"):
            getattr(self.c, f"driver_{name}").restype = ctypes.POINTER(Collection)
        for name in ("workspace", "size_of_desc"):
            getattr(self.c, f"driver_{name}").restype = ctypes.c_size_t
        assert self.c.driver_size_of_desc() == ctypes.sizeof(DynamicDesc)
        assert self.c.driver_open(str(library).encode()) == 2, self.messages()

    def messages(self) -> str:
        """What the library logged since the last call."""
        text = self.c.driver_messages().decode()
        self.c.driver_forget_messages()
        return text

    def use_logger(self, use: bool) -> None:
        self.c.driver_use_logger(str(self.library).encode(), use)

    def create(self, fields: list[Field], version: int = 1) -> Plugin | None:
        return self.create_from(Collection(len(fields), array(Field, fields)), version)

    def create_from(self, collection, version: int = 1, *, runtime: bool = False) -> Plugin | None:
        pointer = collection if collection is None else ctypes.byref(collection)
        made = self.c.driver_create(version, pointer, int(runtime))
        return Plugin(self, made) if made else None


class Plugin:
    """A plugin that the library made."""

    def __init__(self, driver: Driver, pointer: int) -> None:
        self.driver, self.c, self.pointer = driver, driver.c, ctypes.c_void_p(pointer)

    def __del__(self) -> None:
        self.c.driver_destroy(self.pointer)

    def fields(self):
        return self.c.driver_fields(self.pointer)

    def clone(self, *, attach: bool = False) -> Plugin:
        call = self.c.driver_attach if attach else self.c.driver_clone
        return Plugin(self.driver, call(self.pointer))

    def says(self, what: int) -> str:
        return self.c.driver_plugin_says(self.pointer, what).decode()

    def output_types(self, inputs: int, outputs: int = 2) -> list[int] | None:
        types = (ctypes.c_int32 * 8)()
        failed = self.c.driver_output_types(self.pointer, inputs, outputs, types)
        return None if failed else types[:outputs]

    def output_shapes(self, shapes, outputs: int = 2) -> list[list[int]] | None:
        found = (Dims * 8)()
        inputs = array(Dims, [dims(shape) for shape in shapes])
        failed = self.c.driver_output_shapes(self.pointer, inputs, len(shapes), found, outputs)
        return None if failed else [item.d[: item.nbDims] for item in found[:outputs]]

    def supports(self, position: int, tensors: list[Desc], outputs: int = 2) -> bool:
        return bool(
            self.c.driver_supports(
                self.pointer,
                position,
                array(DynamicDesc, [fixed(tensor) for tensor in tensors]),
                len(tensors) - outputs,
                outputs,
            )
        )

    def configure(self, tensors: list[DynamicDesc], outputs: int = 2) -> bool:
        both = array(DynamicDesc, tensors)
        return not self.c.driver_configure(self.pointer, both, len(tensors) - outputs, outputs)

    def workspace(self, tensors: list[DynamicDesc], outputs: int = 2) -> int:
        both = array(DynamicDesc, tensors)
        return self.c.driver_workspace(self.pointer, both, len(tensors) - outputs, outputs)

    def shape_change(self, tensors: list[Desc], outputs: int = 2) -> bool:
        both = array(Desc, tensors)
        return not self.c.driver_shape_change(self.pointer, both, len(tensors) - outputs, outputs)

    def enqueue(self, tensors: list[Desc], inputs, outputs, workspace: int, stream: int) -> bool:
        """Run on device addresses."""
        return not self.c.driver_enqueue(
            self.pointer,
            array(Desc, tensors),
            len(inputs),
            array(ctypes.c_void_p, inputs),
            array(ctypes.c_void_p, outputs),
            ctypes.c_void_p(workspace),
            ctypes.c_void_p(stream),
        )


def compile_driver(folder: Path, nvcc: Path, headers: Path) -> Path:
    """Compile plugin_driver.cpp; nvcc knows where CUDA's headers are."""
    source, library = Path(__file__).with_suffix(".cpp"), folder / "libplugin_driver.so"
    flags = ["-std=c++17", "-cudart=none", "-Xcompiler=-Wall,-Wextra,-fPIC", "-isystem", headers]
    command = [nvcc, *flags, "--shared", source, "-o", library, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library

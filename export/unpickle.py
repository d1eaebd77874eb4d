"""Reading tensors out of PyTorch pickles without running anything that the file asks for.

A pickle is a program: it names functions and calls them. Here no name becomes anything real. The
few functions that rebuild tensors are stand-ins that only record what they were asked for; every
other name becomes an inert class. Its objects, and what calling it "returns", are placeholders that
keep what they are given and can do nothing, so that what stands beside the weights (optimizers,
paths, counters, a pickled ``nn.Module`` of any class path) is no reason to refuse a file.
`export.weights` refuses a placeholder where a weight should be. ``torch.load`` is not used: it
would also read TorchScript, which is code, and tar files, and hands real functions to the pickle.

Both containers of ``torch.save`` are read: the zip archive, and the sequence of pickles before
torch 1.6 (torch/serialization.py describes them by reading them).
"""

from __future__ import annotations

import _compat_pickle
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from export.errors import ExportError
from export.pickle_budget import check_pickle

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle of a file of torch.save before its zip format (torch < 1.6)."""

_LEGACY_PROTOCOL = 1001

_MAX_GLOBALS = 10_000
"""Each becomes a class of some KB; a checkpoint has dozens of them."""

_MAX_PICKLE = 2**28
"""Bytes of a pickle in an archive. Tensors lie outside it."""

_MAX_DIMENSIONS = 64

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}


class UnsafePickleError(ExportError):
    """What calling a function would make stands where a weight should be."""


class Storage(NamedTuple):
    """A storage as the pickle names it: its key, type and number of elements."""

    key: str
    type: str
    numel: int


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it: a strided view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class InertMeta(type):
    """Makes a class that stands for a name of the pickle; calling it runs nothing."""

    origin: str

    def __call__(cls, *args: object, **_kwargs: object) -> Inert:
        """Make the placeholder of a call's result."""
        made: Inert = cls.__new__(cls)  # type: ignore[call-overload]
        made.arguments = args
        return made


class Inert(metaclass=InertMeta):
    """Stands for an object that is not made; keeps what the pickle gives it, by reference.

    Attributes
    ----------
    origin
        Dotted name of what the pickle called or instantiated.
    arguments
        Of a call; None for an instance that was made without one.
    fields
        Its attributes.
    items
        What was put into it by key.
    """

    __slots__ = ("arguments", "fields", "items")
    origin = ""
    arguments: tuple[object, ...] | None
    fields: Mapping[object, object]
    items: dict[object, object]

    def __new__(cls, *_args: object, **_kwargs: object) -> Inert:
        """Make it; whatever the class's own ``__new__`` takes goes."""
        made = object.__new__(cls)
        made.arguments, made.fields, made.items = None, {}, {}
        return made

    def __call__(self, *args: object, **_kwargs: object) -> Inert:
        """Make another placeholder."""
        return type(self)(*args)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state:  # with __slots__: (attributes, slots)
            state = state[0]
        if isinstance(state, dict):
            self.fields = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def append(self, _item: object) -> None:
        """Drop what a list, deque or set of some class holds."""

    extend = add = append


def _rebuild_tensor(storage: object, offset: int, size: Any, stride: Any, *_: object) -> Any:
    if not isinstance(storage, Storage):
        raise ExportError("a tensor without a storage")
    return TensorRecord(storage, int(offset), _size(size), _size(stride))


def _size(size: Any = (), *_: object) -> tuple[int, ...]:
    if len(size) > _MAX_DIMENSIONS:
        raise ExportError(f"a tensor of {len(size)} dimensions")
    return tuple(map(int, size))


def _rebuild_parameter(data: object, *_: object) -> object:
    if not isinstance(data, (TensorRecord, Inert)):
        raise ExportError("a parameter without a tensor")
    return data


def _rebuild_from_type(function: object, _type: object, args: Any, _state: object) -> object:
    """Tensors of subclasses, and parameters that were given attributes."""
    if not isinstance(function, _Call):
        raise ExportError("a tensor without a storage")
    return function(*args)


class _Call:
    """A stand-in function that the pickle can call and do nothing else with."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: object) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UnsafePickleError(f"refused: the pickle sets {name!a} of a function")


_CALLABLE: dict[tuple[str, str], Any] = {
    ("torch", "Size"): _Call(_size),
    ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Call(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Call(_rebuild_from_type),
}


class _Unpickler(pickle.Unpickler):
    """Resolves names to stand-ins and inert classes only; imports nothing."""

    def __init__(self, file: IO[bytes]) -> None:
        # torch.load reads the bytes of Python 2 as UTF-8; they are names, or beside the weights
        super().__init__(file, encoding="latin1")
        self.classes: dict[str, InertMeta] = {}
        self.storages: dict[str, Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # torch.save writes pickle protocol 2, which has the names of Python 2.
        module_name, global_name = _compat_pickle.NAME_MAPPING.get(
            (module_name, global_name),
            (_compat_pickle.IMPORT_MAPPING.get(module_name, module_name), global_name),
        )
        if (module_name, global_name) == ("builtins", "getattr"):  # of a class in a class
            return _Call(self._attribute)
        return _CALLABLE.get((module_name, global_name)) or self._inert(
            f"{module_name}.{global_name}"
        )

    def _inert(self, origin: str) -> InertMeta:
        if origin not in self.classes:
            if len(self.classes) == _MAX_GLOBALS:
                raise ExportError(f"more than {_MAX_GLOBALS} names of classes and functions")
            self.classes[origin] = InertMeta("Inert", (Inert,), {"__slots__": (), "origin": origin})
        return self.classes[origin]

    def _attribute(self, owner: object, name: object, *_: object) -> object:
        if isinstance(owner, InertMeta) and isinstance(name, str):
            return self._inert(f"{owner.origin}.{name}")
        return self._inert("builtins.getattr")(owner, name)

    def persistent_load(self, saved: Any) -> object:
        """Resolve ``("storage", type, key, location, numel, …)`` and ``("module", type, …)``.

        The second held the source of a module's class; only its type counts.
        """
        kind = saved[0].decode() if isinstance(saved[0], bytes) else saved[0]
        if kind not in ("storage", "module"):
            raise ExportError(f"an object saved as {kind!a}")
        if not isinstance(saved[1], InertMeta):
            raise ExportError(f"a {kind} without a type")
        if kind == "module":
            return saved[1]
        view = saved[5] if len(saved) > 5 else None  # pickled before zip: part of a storage
        if view is not None:
            raise ExportError("storages that are views of others; save the state_dict again")
        found = Storage(str(saved[2]), saved[1].origin.rpartition(".")[2], int(saved[4]))
        self.storages[found.key] = found
        return found


Choose = Callable[[object], Mapping[str, object]]
"""From the object that was saved to names and values."""


def load_pickle(path: Path, choose: Choose) -> dict[str, object]:
    """Read the tensors of a ``torch.save`` file.

    Parameters
    ----------
    path
        The file.
    choose
        Finds what is to be read: takes the object that was saved and gives names and values, of
        which those that are a `TensorRecord` become tensors.

    Returns
    -------
    dict
        As `choose` gave it. Tensors that share a storage in the file share it here.

    Raises
    ------
    UnsafePickleError
        When the pickle calls anything to get what `choose` wants.
    ExportError
        When the file is no such file, is truncated, holds something else, or would take more
        memory or time than a checkpoint of its length does.
    """
    try:
        with path.open("rb") as file:
            legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
            file.seek(0)
            return _read_legacy(file, choose) if legacy else _read_zip(file, choose)
    except ExportError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # every corruption has an exception of its own
        raise ExportError(
            f"{path}: truncated or corrupt ({type(error).__name__}: {str(error)[:200]!a})"
        ) from error


def _load(file: IO[bytes]) -> tuple[Any, _Unpickler]:
    """Run a pickle that has been counted; its unpickler knows the storages."""
    start = file.tell()
    check_pickle(file)
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler


def _read_zip(file: IO[bytes], choose: Choose) -> dict[str, object]:
    """Records of the archive: ``<root>/data.pkl``, ``<root>/data/<key>``."""
    with zipfile.ZipFile(file) as archive:
        names = {name.split("/", 1)[-1]: name for name in archive.namelist()}
        if "constants.pkl" in names:
            raise ExportError("a TorchScript archive; save the state_dict instead")
        unpacked = sum(entry.file_size for entry in archive.infolist())
        packed = file.seek(0, 2)
        if unpacked > 4 * packed + 2**20:  # torch.save does not compress
            raise ExportError(f"an archive of {packed} bytes that unpacks to {unpacked}")
        if archive.getinfo(names["data.pkl"]).file_size > _MAX_PICKLE:
            raise ExportError(f"a pickle of more than {_MAX_PICKLE} bytes")
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise ExportError("a big-endian file")
        root, _ = _load(BytesIO(archive.read(names["data.pkl"])))
        return _tensors(choose(root), lambda key: archive.read(names[f"data/{key}"]), packed)


def _read_legacy(file: IO[bytes], choose: Choose) -> dict[str, object]:
    """Five pickles (magic, protocol, system, object, storage keys), then the storages."""
    _load(file)
    if _load(file)[0] != _LEGACY_PROTOCOL:
        raise ExportError("another protocol of torch.save")
    if not _load(file)[0]["little_endian"]:
        raise ExportError("a big-endian file")
    root, unpickler = _load(file)
    places = {}
    for key in _load(file)[0]:
        (numel,) = struct.unpack("<q", file.read(8))
        storage = unpickler.storages[str(key)]
        if numel != storage.numel:
            raise ValueError(f"storage {key} has {numel} elements")
        size = numel * _dtype(storage).itemsize
        places[storage.key] = file.tell(), size
        file.seek(size, 1)

    def read(key: str) -> bytes:
        start, size = places[key]
        file.seek(start)
        return file.read(size)

    return _tensors(choose(root), read, file.seek(0, 2))


def _tensors(
    chosen: Mapping[str, object], read: Callable[[str], bytes], length: int
) -> dict[str, object]:
    """Make the tensors of a file of `length` bytes; `read` gives the bytes of a storage."""
    records = [value for value in chosen.values() if isinstance(value, TensorRecord)]
    size = sum(math.prod(one.size) * _dtype(one.storage).itemsize for one in records)
    if size > 4 * length + 2**20:
        raise ExportError(f"{len(records)} tensors of {size} bytes in a file of {length}")
    flat: dict[Storage, Tensor] = {}
    for storage in {record.storage for record in records}:
        data = read(storage.key)
        if len(data) != storage.numel * _dtype(storage).itemsize:
            raise ValueError(f"storage {storage.key} has {len(data)} bytes")
        flat[storage] = (
            torch.frombuffer(bytearray(data), dtype=_dtype(storage))
            if data
            else torch.empty(0, dtype=_dtype(storage))
        )
    return {
        name: _tensor(value, flat[value.storage]) if isinstance(value, TensorRecord) else value
        for name, value in chosen.items()
    }


def _dtype(storage: Storage) -> torch.dtype:
    if storage.type not in _STORAGE_DTYPES:
        raise ExportError(f"a tensor of type {storage.type!a}")
    return _STORAGE_DTYPES[storage.type]


def _tensor(record: TensorRecord, flat: Tensor) -> Tensor:
    """View a storage; ValueError or RuntimeError where the record does not fit it."""
    if math.prod(record.size) > record.storage.numel:
        raise ValueError(f"a tensor {list(record.size)} in a storage of {record.storage.numel}")
    if not record.storage.numel:
        return torch.empty(record.size, dtype=flat.dtype)
    return flat.as_strided(record.size, record.stride, record.offset)

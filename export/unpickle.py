"""Reading tensors out of PyTorch pickles without running anything that the file asks for.

A pickle is a program: it names functions and calls them. Here no name becomes anything real. The
few functions that rebuild tensors are stand-ins that only record what they were asked for; every
other name becomes an inert class, whose objects can be made and filled (a pickled ``nn.Module`` of
any class path is just that) but not called. ``torch.load`` is not used: it would also read
TorchScript, which is code, and tar files, and hands real functions to the pickle.

Both containers of ``torch.save`` are read: the zip archive, and the sequence of pickles before
torch 1.6 (torch/serialization.py describes them by reading them).
"""

from __future__ import annotations

import _compat_pickle
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from export.errors import ExportError
from export.names import text_list

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle of a file of torch.save before its zip format (torch < 1.6)."""

_LEGACY_PROTOCOL = 1001

_NAMES = ("class_names", "names", "classes")
"""Under which checkpoints keep the names of their classes."""

_MODULE_LIMIT = 10_000
"""More modules than any checkpoint has: a pickle can share one child 2^40 times."""

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
}


class UnsafePickleError(ExportError):
    """The file calls a function that is no part of rebuilding tensors."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage as the pickle names it: its key, type and number of elements."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class _TensorRecord:
    """A tensor as the pickle describes it: a strided view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _InertMeta(type):
    """Makes a class that can be instantiated by the unpickler but not called by the pickle."""

    def __call__(cls, *_args: object, **_kwargs: object) -> NoReturn:
        raise UnsafePickleError(
            f"refused: the pickle calls {cls.__module__}.{cls.__qualname__}, which a checkpoint "
            "has no need for; do not load this file"
        )


class _Inert(metaclass=_InertMeta):
    """Stands for an object of a class that is not imported; keeps its attributes."""

    def __new__(cls, *_args: object) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _InertValue:
    """The result of a harmless call among a module's attributes: made, never looked at."""

    __slots__ = ()

    def __init__(self, *_args: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def _rebuild_tensor(storage: object, offset: int, size: Any, stride: Any, *_: object) -> Any:
    if not isinstance(storage, _Storage):
        raise ExportError("a tensor without a storage")
    return _TensorRecord(storage, int(offset), tuple(size), tuple(stride))


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


class _Call:
    """A stand-in function that the pickle can call and do nothing else with."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: object) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UnsafePickleError(f"refused: the pickle sets {name} of a function")


_CALLABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): _Call(lambda *_: _InertValue()),
    ("_codecs", "encode"): _Call(lambda *_: _InertValue()),  # the bytes of a numpy scalar
    ("torch", "Size"): _Call(lambda size=(): tuple(size)),
    ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    # torch <= 1.1 pickled it as an attribute of every module
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"): _Call(lambda *_: _InertValue()),
}


class _Unpickler(pickle.Unpickler):
    """Resolves names to stand-ins and inert classes only; imports nothing."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # torch.save writes pickle protocol 2, which has the names of Python 2.
        module_name, global_name = _compat_pickle.NAME_MAPPING.get(
            (module_name, global_name),
            (_compat_pickle.IMPORT_MAPPING.get(module_name, module_name), global_name),
        )
        known = _CALLABLE.get((module_name, global_name))
        if known is not None:
            return known
        if module_name.split(".", maxsplit=1)[0] == "numpy":
            return _InertValue
        return _InertMeta(global_name, (_Inert,), {"__module__": module_name})

    def persistent_load(self, saved: Any) -> object:
        """Resolve ``("storage", type, key, location, numel, …)`` and ``("module", type, …)``.

        The second held the source of a module's class; only its type counts.
        """
        kind = saved[0].decode() if isinstance(saved[0], bytes) else saved[0]
        if kind == "module":
            return saved[1]
        if kind != "storage":
            raise ExportError(f"an object saved as {kind!r}")
        view = saved[5] if len(saved) > 5 else None  # pickled before zip: part of a storage
        if view is not None:
            raise ExportError("storages that are views of others; save the state_dict again")
        name = saved[1].__name__
        if name not in _STORAGE_DTYPES:
            raise ExportError(f"a tensor of type {name}")
        return _Storage(str(saved[2]), _STORAGE_DTYPES[name], int(saved[4]))


def load_pickle(path: Path) -> tuple[dict[str, object], tuple[str, ...]]:
    """Read the tensors of a ``torch.save`` file, and the class names beside them.

    Returns
    -------
    tensors
        Name to tensor, from a whole pickled module, ``{"model": state_dict}`` or a state dict. A
        value that is no tensor stays whatever it is.
    names
        Texts under one of `_NAMES`, beside the state dict or in the module; none without any.

    Raises
    ------
    UnsafePickleError
        When the pickle calls anything that does not rebuild a tensor.
    ExportError
        When the file is no such file, is truncated, or holds something else.
    """
    try:
        with path.open("rb") as file:
            legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
            file.seek(0)
            root, storages = _read_legacy(file) if legacy else _read_zip(file)
            tensors = {
                name: _tensor(value, storages) if isinstance(value, _TensorRecord) else value
                for name, value in _named_values(root)
            }
            return tensors, _names(root)
    except ExportError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # every corruption has an exception of its own
        raise ExportError(
            f"{path}: truncated or corrupt ({type(error).__name__}: {error})"
        ) from error


def _read_zip(file: IO[bytes]) -> tuple[object, Mapping[str, bytes]]:
    """Records of the archive: ``<root>/data.pkl``, ``<root>/data/<key>``."""
    with zipfile.ZipFile(file) as archive:
        names = {name.split("/", 1)[-1]: name for name in archive.namelist()}
        if "constants.pkl" in names:
            raise ExportError("a TorchScript archive; save the state_dict instead")
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise ExportError("a big-endian file")
        with archive.open(names["data.pkl"]) as data:
            root = _Unpickler(data).load()
        storages = {
            name.removeprefix("data/"): archive.read(full)
            for name, full in names.items()
            if name.startswith("data/")
        }
    return root, storages


def _read_legacy(file: IO[bytes]) -> tuple[object, Mapping[str, bytes]]:
    """Five pickles (magic, protocol, system, object, storage keys), then the storages."""
    _Unpickler(file).load()
    if _Unpickler(file).load() != _LEGACY_PROTOCOL:
        raise ExportError("another protocol of torch.save")
    if not _Unpickler(file).load()["little_endian"]:
        raise ExportError("a big-endian file")
    unpickler = _LegacyUnpickler(file)
    root = unpickler.load()
    storages = {}
    for key in _Unpickler(file).load():
        (numel,) = struct.unpack("<q", file.read(8))
        size = numel * unpickler.storages[str(key)].dtype.itemsize
        storages[str(key)] = file.read(size)
    return root, storages


class _LegacyUnpickler(_Unpickler):
    """Also remembers the storages, whose element sizes tell where each ends in the file."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, saved: Any) -> object:
        found = super().persistent_load(saved)
        if isinstance(found, _Storage):
            self.storages[found.key] = found
        return found


def _tensor(record: _TensorRecord, storages: Mapping[str, bytes]) -> Tensor:
    """Make the tensor; ValueError or RuntimeError where the record does not fit its storage."""
    storage = record.storage
    data = storages[storage.key]
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key} has {len(data)} bytes")
    if math.prod(record.size) > storage.numel:
        raise ValueError(f"a tensor {list(record.size)} in a storage of {storage.numel}")
    if not data:
        return torch.empty(record.size, dtype=storage.dtype)
    flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
    return flat.as_strided(record.size, record.stride, record.offset).clone()


def _names(root: object) -> tuple[str, ...]:
    fields = vars(root) if isinstance(root, _Inert) else root
    found = fields if isinstance(fields, dict) else {}
    return next(filter(None, (text_list(found.get(key)) for key in _NAMES)), ())


def _named_values(root: object) -> Iterator[tuple[str, object]]:
    """Names and values of what a checkpoint holds: a module or a state dict, perhaps wrapped."""
    for key in ("model", "state_dict"):
        if isinstance(root, dict) and isinstance(root.get(key), dict):
            root = root[key]
    if isinstance(root, _Inert):
        yield from _module_tensors(root)
    elif isinstance(root, dict):
        yield from ((str(name), value) for name, value in root.items())
    else:
        raise ExportError(f"holds a {type(root).__name__}, not a module or a state_dict")


def _module_tensors(root: _Inert) -> Iterator[tuple[str, object]]:
    """Walk a pickled module tree in the order of ``state_dict()``."""
    stack: list[tuple[str, object]] = [("", root)]
    for _ in range(_MODULE_LIMIT):
        if not stack:
            return
        prefix, module = stack.pop()
        fields = vars(module)
        for kind in ("_parameters", "_buffers"):
            for name, value in fields.get(kind, {}).items():
                if value is not None:
                    yield f"{prefix}{name}", value
        children = [(name, c) for name, c in fields.get("_modules", {}).items() if c is not None]
        stack.extend((f"{prefix}{name}.", child) for name, child in reversed(children))
    raise ExportError(f"more than {_MODULE_LIMIT} modules")

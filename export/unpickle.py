"""Reading tensors out of PyTorch pickles without running anything that the file asks for.

A pickle is a program: it names functions and calls them. Here only the few functions that
rebuild tensors are real. Every other name becomes an inert class: objects of it can be made and
filled (a pickled ``nn.Module`` of any class path is just that), but calling it is refused by name.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from export.errors import ExportError

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file of torch.save before its zip format (torch < 1.6)."""


class _InertValue:
    """A numpy scalar or array among a module's attributes: made, never looked at."""

    def __init__(self, *_args: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


_CALLABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("_codecs", "encode"): _InertValue,  # the bytes of a numpy scalar
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class UnsafePickleError(ExportError):
    """The file calls a function that is no part of rebuilding tensors."""


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


def _inert(module: str, name: str) -> _InertMeta:
    return _InertMeta(name, (_Inert,), {"__module__": module})


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves names to tensor rebuilders and inert classes only."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return what stands for ``module.name``; imports nothing."""
        # torch.save writes pickle protocol 2, which has the names of Python 2.
        module_name, global_name = _compat_pickle.NAME_MAPPING.get(
            (module_name, global_name),
            (_compat_pickle.IMPORT_MAPPING.get(module_name, module_name), global_name),
        )
        known = _CALLABLE.get((module_name, global_name))
        if known is not None:
            return known
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name.split(".", maxsplit=1)[0] == "numpy":
            return _InertValue
        return _inert(module_name, global_name)


def _load(file: Any, **kwargs: Any) -> Any:
    return RestrictedUnpickler(file, **kwargs).load()


_PICKLE = SimpleNamespace(
    __name__="restricted_pickle",
    Unpickler=RestrictedUnpickler,
    load=_load,
    UnpicklingError=ValueError,
)


def module_tensors(root: object) -> Iterator[tuple[str, object]]:
    """Walk a pickled module tree: (dotted name, tensor) in the order of ``state_dict()``."""
    fields = vars(root)
    for kind in ("_parameters", "_buffers"):
        for name, value in fields.get(kind, {}).items():
            if value is not None:
                yield name, value
    for name, child in fields.get("_modules", {}).items():
        if child is not None:
            for inner, value in module_tensors(child):
                yield f"{name}.{inner}", value


def load_pickle(path: Path) -> dict[str, object]:
    """Read the tensors of a ``torch.save`` file.

    Returns
    -------
    Name to tensor, from a whole pickled module, ``{"model": state_dict}`` or a state dict.

    Raises
    ------
    UnsafePickleError
        When the pickle calls anything that does not rebuild a tensor.
    ExportError
        When the file is no such file, is truncated, or holds something else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise ExportError("a TorchScript archive; save the state_dict instead")
        root = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except ExportError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # every corruption has an exception of its own
        raise ExportError(
            f"{path}: truncated or corrupt ({type(error).__name__}: {error})"
        ) from error
    if isinstance(root, dict) and isinstance(root.get("model"), dict):
        root = root["model"]
    if isinstance(root, _Inert):
        return dict(module_tensors(root))
    if isinstance(root, dict):
        return {str(name): value for name, value in root.items()}
    raise ExportError(f"{path}: holds a {type(root).__name__}, not a module or a state_dict")

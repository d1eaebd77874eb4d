"""Which part of what a checkpoint holds are the weights, however they are wrapped.

What is walked here comes from `export.unpickle`: literals, tensor records, and placeholders, which
may hold one another, so that every walk has a bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from export.errors import ExportError
from export.names import text_list
from export.unpickle import Inert, TensorRecord, UnsafePickleError

ENTRIES = ("model", "state_dict", "model_state_dict", "ema", "module", "net", "network")
"""Keys under which training scripts keep the weights, the first that is there counts."""

WRAPPERS = ("module.", "model.", "net.", "network.", "ema.")
"""What DataParallel, Lightning and averaging put before every name."""

_COMPILED = "_orig_mod."
"""What torch.compile puts into the names of what it wraps, wherever that is."""

_AVERAGED = "n_averaged"
"""Counter of torch.optim.swa_utils.AveragedModel, beside its ``module.``."""

_NAMES = ("class_names", "names", "classes")
"""Under which checkpoints keep the names of their classes."""

_SHOWN = 10
_LOOKED_AT = 100
"""Entries of an entry in which weights are looked for, so that a choice can be named."""

_MAX_LEVELS = 8
_MAX_MODULES = 10_000
_MAX_MODULE_DEPTH = 100
_MAX_TENSORS = 100_000
_MAX_NAME = 1_000
"""Far more than any checkpoint has: a pickle can share one child 2^40 times."""


@dataclass(frozen=True)
class Weights:
    """What was found.

    Attributes
    ----------
    values
        Name to tensor record or tensor.
    entry
        Dotted keys that led there; empty: the file holds nothing else.
    beside
        Keys of what lies beside it.
    others
        Those of `beside` that hold weights, too.
    names
        Class names beside the weights or in the module; none without any.
    """

    values: Mapping[str, object]
    entry: str
    beside: tuple[str, ...]
    others: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def said(self) -> str:
        """The entry, and what lies beside it, for people; empty: the file holds nothing else."""
        if not self.entry:
            return ""
        more = f", not read: {', '.join(self.beside[:_SHOWN])}" if self.beside else ""
        more += f" and {len(self.beside) - _SHOWN} more" if len(self.beside) > _SHOWN else ""
        if self.others:
            more += f"; --entry takes other weights: {', '.join(self.others[:_SHOWN])}"
        return f"its entry {self.entry}{more}"


def find_weights(root: object, wanted: str = "") -> Weights:
    """Find a module or a state dict in what was saved.

    Parameters
    ----------
    root
        What was saved.
    wanted
        Dotted keys of the entry to look in; empty: the first of `ENTRIES`.

    Raises
    ------
    UnsafePickleError
        What a call would make stands where weights should be.
    ExportError
        There are none, or several that might be meant, or more than a checkpoint has; no entry of
        that name.
    """
    entry: list[str] = []
    beside: list[str] = []
    others: list[str] = []
    names: tuple[str, ...] = ()
    for _ in range(_MAX_LEVELS):
        content = _mapping(root)
        for fields in (content, getattr(root, "fields", {})):
            names = names or next(filter(None, (_texts(fields.get(key)) for key in _NAMES)), ())
        key: str | None
        if wanted:
            key, wanted = _named(root, content, wanted)
        else:
            key = None if _is_module(root) else _entry(content)
        if key is None:
            values = dict(_module_tensors(root) if _is_module(root) else _state_dict(root))
            joined = ".".join(entry)
            return Weights(_unwrapped(values), joined, tuple(beside), tuple(others), names)
        beside = [shown(other) for other in content if other != key]
        above = "".join(f"{one}." for one in entry)
        others += [above + one for one in _with_weights(content) if one != key]
        entry.append(shown(key))
        root = content[key]
    raise ExportError(f"dictionaries nested deeper than {_MAX_LEVELS} around the weights")


def _texts(value: object) -> tuple[str, ...]:
    return text_list(value.items if isinstance(value, Inert) else value)


def _mapping(value: object) -> Mapping[object, object]:
    """What is in a dict, an OrderedDict or another of its kind, or what an object holds."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Inert):
        return {}
    if value.items:
        return value.items
    pairs = value.arguments[0] if value.arguments else None
    if value.origin == "collections.OrderedDict" and isinstance(pairs, list):  # of Python 2
        return dict(pairs)
    return value.fields


def _is_module(value: object) -> bool:
    return isinstance(value, Inert) and (
        "_modules" in value.fields or "_parameters" in value.fields
    )


def _named(root: object, content: Mapping[object, object], wanted: str) -> tuple[str, str]:
    """First of the dotted keys, and the others; a key may have dots itself."""
    keys = {} if _is_module(root) else content
    key, _, rest = (wanted, "", "") if wanted in keys else wanted.partition(".")
    if key not in keys:
        there = ", ".join(_with_weights(keys)[:_SHOWN]) or "none"
        raise ExportError(f"no entry {shown(key)} in it; those that hold weights: {there}")
    return key, rest


def _with_weights(content: Mapping[object, object]) -> list[str]:
    """Keys whose values are a module or a state dict, or hold one."""
    return [
        shown(key)
        for key, value in islice(content.items(), _LOOKED_AT)
        if isinstance(key, str)
        and any(
            _is_module(one) or _is_state_dict(one)
            for one in (value, *islice(_mapping(value).values(), _LOOKED_AT))
        )
    ]


def _entry(content: Mapping[object, object]) -> str | None:
    """Key to go on with; None: these are the weights, if there are any."""
    for key in ENTRIES:
        if _is_module(content.get(key)) or _mapping(content.get(key)):
            return key
    if any(isinstance(value, (TensorRecord, Tensor)) for value in content.values()):
        return None
    found = [
        key
        for key, value in content.items()
        if isinstance(key, str) and (_is_module(value) or _is_state_dict(value))
    ]
    if len(found) > 1:
        raise ExportError(
            f"weights under {', '.join(map(shown, found[:10]))}: say with --entry which are meant"
        )
    return found[0] if found else None


def _is_state_dict(value: object) -> bool:
    content = _mapping(value)
    return bool(content) and all(
        isinstance(key, str) and isinstance(one, TensorRecord) for key, one in content.items()
    )


def _state_dict(root: object) -> Iterator[tuple[str, object]]:
    """Tensors of a state dict; plain values beside them are left out."""
    if isinstance(root, Inert) and root.arguments is not None and not _mapping(root):
        raise _call(root, "all that it holds")
    content = _mapping(root)
    if not any(
        isinstance(one, (TensorRecord, Tensor))
        or (isinstance(one, Inert) and one.arguments is not None)
        for one in content.values()
    ):
        raise _no_weights(root, content)
    _bound(len(content), _MAX_TENSORS, "names in the state_dict")
    found = any(isinstance(value, TensorRecord) for value in content.values())
    for name, value in content.items():
        if found and isinstance(value, (int, float, str, type(None))):
            continue
        yield _name(name), _weight(name, value)


def _no_weights(root: object, content: Mapping[object, object]) -> ExportError:
    """Say what is there instead, and what would do."""
    there = [f"{shown(key)} ({_kind(value)})" for key, value in islice(content.items(), _SHOWN)]
    more = f" and {len(content) - _SHOWN} more" if len(content) > _SHOWN else ""
    nothing = root is None or root == {}
    found = f"{', '.join(there)}{more}" if there else "nothing" if nothing else f"a {_kind(root)}"
    return ExportError(
        f"no weights in it; it holds {found}; needed is a state_dict (names to tensors) or a "
        f"module, alone or under {', '.join(ENTRIES)} or another name"
    )


def _kind(value: object) -> str:
    if isinstance(value, Inert):
        return f"{shown(value.origin)} object"
    empty = isinstance(value, (dict, list, str)) and not value
    return f"{'empty ' if empty else ''}{type(value).__name__}"


def _module_tensors(root: object) -> Iterator[tuple[str, object]]:
    """Walk a pickled module tree in the order of ``state_dict()``."""
    stack: list[tuple[str, int, object]] = [("", 0, root)]
    modules = tensors = 0
    while stack:
        prefix, depth, module = stack.pop()
        modules += 1
        _bound(modules, _MAX_MODULES, "modules")
        _bound(depth, _MAX_MODULE_DEPTH, "modules in one another")
        if not isinstance(module, Inert):
            raise ExportError(f"{shown(prefix)} is a {type(module).__name__}, no module")
        fields = module.fields
        for kind in ("_parameters", "_buffers"):
            for name, value in _part(fields, kind).items():
                tensors += 1
                _bound(tensors, _MAX_TENSORS, "tensors in the module")
                if value is not None:
                    yield _name(f"{prefix}{_name(name)}"), _weight(name, value)
        children = [(_name(n), c) for n, c in _part(fields, "_modules").items() if c is not None]
        _bound(len(children), _MAX_MODULES, "modules")
        stack.extend(
            (_name(f"{prefix}{name}."), depth + 1, child) for name, child in reversed(children)
        )
        _bound(len(stack), _MAX_MODULES, "modules")


def _part(fields: Mapping[object, object], kind: str) -> Mapping[object, object]:
    part = fields.get(kind, {})
    if not isinstance(part, (dict, Inert)):
        raise ExportError(f"truncated or corrupt: {kind} of a module is a {type(part).__name__}")
    return _mapping(part)


def _weight(name: object, value: object) -> object:
    if isinstance(value, Inert) and value.arguments is not None:
        raise _call(value, shown(name))
    if not isinstance(value, (TensorRecord, Tensor)):
        kind = f", but a {shown(value.origin)}" if isinstance(value, Inert) else ""
        raise ExportError(f"not a state_dict: '{shown(name)}' is no tensor{kind}")
    return value


def _call(value: Inert, what: str) -> UnsafePickleError:
    """Say what would have to be called, the innermost call first."""
    for _ in range(_MAX_LEVELS):
        inner = [one for one in value.arguments or () if isinstance(one, Inert)]
        if not inner or inner[0].arguments is None:
            break
        value = inner[0]
    return UnsafePickleError(
        f"refused: the pickle calls {shown(value.origin)} to make {what}, which no weights need; "
        "nothing was called; do not load this file elsewhere"
    )


def _name(name: object) -> str:
    if not isinstance(name, str) or not name.isprintable():
        raise ExportError(f"not a state_dict: {shown(name)} is no name of a tensor")
    if len(name) > _MAX_NAME:
        raise ExportError(f"a name of {len(name)} characters; at most {_MAX_NAME}")
    return name


def shown(value: object) -> str:
    """For a message: a text of the file, or of what kind a thing is."""
    if isinstance(value, str):
        text = value[:100]
        return text if text.isprintable() and text else ascii(text)
    return f"a {shown(value.origin)}" if isinstance(value, Inert) else f"a {type(value).__name__}"


def _bound(number: int, limit: int, what: str) -> None:
    if number > limit:
        raise ExportError(f"more than {limit} {what}")


def _unwrapped(values: Mapping[str, object]) -> dict[str, object]:
    """Drop what wrappers put before every name."""
    names = {name: name.replace(_COMPILED, "") for name in values}
    while True:
        rest = [name for name in names.values() if name != _AVERAGED]
        prefix = next((p for p in WRAPPERS if rest and all(n.startswith(p) for n in rest)), None)
        if prefix is None:
            break
        names = {old: name.removeprefix(prefix) for old, name in names.items() if name in rest}
    found = {name: values[old] for old, name in names.items()}
    if len(found) != len(names):
        raise ExportError("two tensors have one name without what their wrappers put before it")
    return found

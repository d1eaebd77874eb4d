"""Damage to a document: what a strict reader of its format must refuse, and under which path."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
"""Documents that JSON can write."""


@dataclass(frozen=True)
class Sample:
    """A good document of a format, with names that are identifiers alone.

    Attributes
    ----------
    document
        Its content.
    maps
        Paths of the objects whose keys are free.
    anything
        Paths below which anything may stand.
    nullable, optional
        Paths that may be null, or absent.
    """

    document: dict[str, Any]
    maps: frozenset[str] = field(default_factory=frozenset)
    anything: frozenset[str] = field(default_factory=frozenset)
    nullable: frozenset[str] = field(default_factory=frozenset)
    optional: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Damage:
    """A damaged document, and the path and the word for it that a message must have."""

    document: dict[str, Any]
    says: str


@st.composite
def damages(draw: st.DrawFn, sample: Sample, kinds: tuple[str, ...] = ("replace", "remove", "add")):
    """A sample with one field of another type, one field less, or one more."""
    document = copy.deepcopy(sample.document)
    places = list(_places(document, sample, ()))
    kind = draw(st.sampled_from(kinds))
    if kind == "replace":
        path, value = draw(st.sampled_from(places))
        nullable = _plain(path) in sample.nullable
        wrong = draw(
            JSON.filter(lambda new: _type(new) != _type(value) and not (new is None and nullable))
        )
        _at(document, path[:-1])[path[-1]] = wrong
        return Damage(document, f"{_written(path)}: ")
    objects = [((), document), *places]
    closed = [
        (path, one)
        for path, one in objects
        if isinstance(one, dict) and _plain(path) not in sample.maps
    ]
    if kind == "add":
        path, one = draw(st.sampled_from(closed))
        one["unheard_of"] = draw(JSON)
        return Damage(document, f"{_written((*path, 'unheard_of'))}: unknown")
    needed = [
        (path, one, name)
        for path, one in closed
        for name in one
        if _plain((*path, name)) not in sample.optional
    ]
    path, one, name = draw(st.sampled_from(needed))
    del one[name]
    return Damage(document, f"{_written((*path, name))}: missing")


def _places(value: Any, sample: Sample, path: tuple) -> Iterator[tuple[tuple, Any]]:
    """Every field, with its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        here = (*path, key)
        yield here, item
        if isinstance(item, (dict, list)) and _plain(here) not in sample.anything:
            yield from _places(item, sample, here)


def _type(value: object) -> str:
    # bool is an int in Python, and a type of its own in JSON
    for name, kinds in (("truth", bool), ("number", (int, float)), ("text", str), ("list", list)):
        if isinstance(value, kinds):
            return name
    return "null" if value is None else "object"


def _at(document: Any, path: tuple) -> Any:
    for step in path:
        document = document[step]
    return document


def _written(path: tuple) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]


def _plain(path: tuple) -> str:
    """Path with ``[]`` for every position of a list."""
    return re.sub(r"\[\d+\]", "[]", _written(path))

"""JSON and TOML files at the border: read strictly, and held to the dataclass of their format.

The fields of a format stand once, in a dataclass. pydantic checks a document against it in strict
mode: no text and no boolean passes for a number, and what the dataclass does not know is refused.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError

from engine.errors import EngineError, one_line

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

DEPTH = 64
"""Lists and objects that may lie in each other; what is read here has far fewer."""

_DIGITS = 20  # of 64-bit numbers
_SHOWN = 60  # characters of a wrong value

T = TypeVar("T")


def parse_json(content: bytes | str, *, infinite: bool = False) -> Any:
    """Parse a JSON document.

    Parameters
    ----------
    content
        UTF-8 where it is bytes.
    infinite
        Whether ``Infinity`` is a number.

    Raises
    ------
    ValueError
        When it is not JSON, a key stands twice in one object, a number is none or too large for
        64 bits, or more than `DEPTH` lists and objects lie in each other; one line.
    """

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise ValueError(f"{name} is no number")

    try:
        document = json.loads(
            content if isinstance(content, str) else content.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(document)
    return document


def read_json(path: Path, remedy: str = "", *, infinite: bool = False) -> Any:
    """Read a JSON file; see `parse_json`.

    Parameters
    ----------
    remedy
        What to do about a file that is none, for the message.

    Raises
    ------
    EngineError
        When it cannot be read, or parsed.
    """
    try:
        return parse_json(path.read_bytes(), infinite=infinite)
    except OSError as error:
        raise EngineError(f"{path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise EngineError(_line(f"{path}: {error}", remedy)) from error


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    EngineError
        When it cannot be read, is not TOML, a number is none or too large for 64 bits, or more than
        `DEPTH` lists and tables lie in each other.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=_finite)
        _check_depth(document)
    except OSError as error:
        raise EngineError(f"{path}: cannot read it: {error.strerror}") from error
    except RecursionError as error:
        raise EngineError(f"{path}: cannot read it: {_TOO_DEEP}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise EngineError(f"{path}: cannot read it: {one_line(error)}") from error
    return document


def read_as(kind: type[T], path: Path, remedy: str = "") -> T:
    """Read a JSON file of a format; see `read_json` and `checked`."""
    return checked(kind, read_json(path, remedy), f"{path}: ", remedy)


def checked(kind: type[T], document: object, where: str, remedy: str = "") -> T:
    """Turn the content of a JSON or TOML file into what its format says.

    Parameters
    ----------
    kind
        The format: a dataclass, or a mapping of them.
    document
        Content of the file, or a part of it.
    where
        What stands before the path of a field in a message, as ``manifest.json: ``.
    remedy
        What to do about a file that is none, for the message.

    Raises
    ------
    EngineError
        When a field is missing, unknown or not what the format says: the path of the first one.
    """
    # TOML's dates are refused wherever they stand: no format has a list of texts in their place
    text = json.dumps(document, default=lambda date: [str(date)])
    try:
        found: T = _adapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = _path(first["loc"])
        separator = ": " if path else ""
        problem = _problem(first, kind)
        raise EngineError(_line(f"{where}{path}{separator}{problem}", remedy)) from error
    return found


def one_of(names: Collection[str]) -> AfterValidator:
    """Refuse a text that is not among these, in the annotation of a field."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return name

    return AfterValidator(check)


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)

_TOO_DEEP = f"more than {DEPTH} lists and objects in each other"


def _line(text: str, remedy: str) -> str:
    return f"{text}; {remedy}" if remedy else text


def _path(steps: tuple[int | str, ...]) -> str:
    """Path of a field, as ``plugins[0].sha256`` or ``scales["a/b"]``."""
    text = ""
    for step in steps:
        name = isinstance(step, str) and step.isidentifier()
        text += f".{step}" if name else f"[{json.dumps(step)}]"
    return text.removeprefix(".")


def _problem(error: ErrorDetails, kind: type) -> str:
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "unexpected_keyword_argument":
        known = is_dataclass(kind) and len(error["loc"]) == 1
        return "unknown" + (f"; known: {', '.join(f.name for f in fields(kind))}" if known else "")
    message = one_line(error["msg"])
    expected = message.removeprefix("Input should be ").removeprefix("Value error, ")
    if expected == message:
        return message
    shown = json.dumps(error["input"])
    return f"{expected} expected, not {shown[:_SHOWN]}{'…' * (len(shown) > _SHOWN)}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {json.dumps(twice)} stands twice")
    return found


def _whole(text: str) -> int:
    if len(text.removeprefix("-")) > _DIGITS:
        raise ValueError(f"{text[:_DIGITS]}… is too large a number")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        what = "no number" if math.isnan(value) else "too large a number"
        raise ValueError(f"{text[:_DIGITS]} is {what}")
    return value


def _check_depth(document: object) -> None:
    level = [document]
    for _ in range(DEPTH):
        for one in level:  # TOML's; JSON's are looked at as they are read
            if isinstance(one, int) and abs(one) >= 10**_DIGITS:
                raise ValueError(f"{str(one)[:_DIGITS]}… is too large a number")
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise ValueError(_TOO_DEEP)

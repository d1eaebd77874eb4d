"""The reader of JSON and TOML: what it takes, and the line that it gives for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.support.documents import (
    DEPTH,
    checked,
    one_of,
    parse_json,
    read_as,
    read_json,
    read_toml,
)
from tests.support import attempt
from tests.support.formats import JSON, Sample, damages

DEEP = 100_000


@dataclass(frozen=True)
class Inner:
    size: int
    share: float
    name: str = ""


@dataclass(frozen=True)
class Outer:
    kind: Annotated[str, one_of(("red", "blue"))]
    sizes: tuple[int, ...]
    inner: Inner
    by_name: Mapping[str, Inner]
    more: Mapping[str, Any]
    note: str | None = None
    good: bool = field(default=True, metadata={"key": "unread"})


WHOLE = st.integers(-(2**63), 2**64 - 1)
INNER = st.builds(Inner, WHOLE, st.floats(allow_nan=False, allow_infinity=False), st.text())

SAMPLE = Sample(
    {
        "kind": "red",
        "sizes": [1, 2],
        "inner": {"size": 1, "share": 0.5, "name": "x"},
        "by_name": {"a": {"size": 2, "share": 1.0, "name": ""}},
        "more": {"any": [1]},
        "note": "n",
        "good": False,
    },
    maps=frozenset({"by_name", "more"}),
    anything=frozenset({"more"}),
    nullable=frozenset({"note"}),
    optional=frozenset({"note", "good", "inner.name", "by_name.a.name"}),
)


@given(JSON)
def test_what_json_writes_comes_back(document):
    assert parse_json(json.dumps(document).encode()) == document
    assert parse_json(json.dumps(document, ensure_ascii=False)) == document
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(document).encode()) == document


@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0123e9-. a\\u', max_size=40))
def test_any_content_is_read_or_one_line(content):
    try:
        parse_json(content)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value"),
        (b'{"a": 1,}', "not JSON"),
        ('{"a": "ä"}'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', 'the key "c" stands twice'),
        (b'{"a": 1, "\\u0061": 2}', 'the key "a" stands twice'),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is too large"),
        (b"9" * 5000, "is too large"),
        (b"[" * DEEP, "in each other"),
        (b"[" * DEEP + b"]" * DEEP, "in each other"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "in each other"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "in each other"),
    ],
)
def test_what_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_json(content)
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(EngineError) as caught:
        read_json(path, "make it anew")
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; make it anew")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_just_taken():
    assert parse_json(b"[" * DEPTH + b"]" * DEPTH)
    assert parse_json(b"[18446744073709551615, -9223372036854775808]") == [2**64 - 1, -(2**63)]
    assert parse_json("[Infinity, -Infinity]", infinite=True) == [float("inf"), -float("inf")]
    with pytest.raises(ValueError, match="NaN"):
        parse_json("[NaN]", infinite=True)


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_a_file_that_cannot_be_read(read, tmp_path):
    with pytest.raises(EngineError, match=r"none: cannot read it: No such file"):
        read(tmp_path / "none")
    with pytest.raises(EngineError, match="cannot read it: Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"a = " + b"[" * DEEP,
        b"a = " + b"[" * 70 + b"]" * 70,
        b"a = 1\na = 2",
        b'a = "\xff"',
        b"[",
        b"a = [" + b"9" * 400 + b"]",
        b"a = 0x" + b"f" * 9000,
        b"a = inf",
        b"a = -nan",
        b"a = 1e400",
    ],
)
def test_toml_that_is_refused(content, tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(EngineError, match="cannot read it: ") as caught:
        read_toml(path)
    assert len(str(caught.value).splitlines()) == 1


@given(
    st.builds(
        Outer,
        kind=st.sampled_from(["red", "blue"]),
        sizes=st.lists(WHOLE).map(tuple),
        inner=INNER,
        by_name=st.dictionaries(st.text(), INNER, max_size=3),
        more=st.dictionaries(st.text(), JSON, max_size=3),
        note=st.none() | st.text(),
    )
)
def test_a_dataclass_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "outer.json"
    path.write_text(json.dumps(asdict(value)))
    assert read_as(Outer, path) == value


@given(damages(SAMPLE))
def test_damage_is_named_by_its_path(damage):
    with pytest.raises(EngineError) as caught:
        checked(Outer, damage.document, "a.json: ", "make it anew")
    assert str(caught.value).startswith(f"a.json: {damage.says}")
    assert str(caught.value).endswith("; make it anew")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "green"}, 'kind: one of red, blue expected, not "green"'),
        ({"sizes": [1, True]}, "sizes[1]: a valid integer expected, not true"),
        (
            {"by_name": {"conv 1/weight": {"size": 1, "share": "0.5"}}},
            'by_name["conv 1/weight"].share: a valid number expected, not "0.5"',
        ),
        ({"nots": 1}, "nots: unknown; known: kind, sizes, inner, by_name, more, note, good"),
        ({"note": ["x" * 99]}, f'note: a valid string expected, not ["{"x" * 58}…'),
        ({"line\nbreak": 1}, '["line\\nbreak"]: unknown; known: kind'),
    ],
)
def test_messages(change, message):
    with pytest.raises(EngineError) as caught:
        checked(Outer, SAMPLE.document | change, "a.json: ")
    assert str(caught.value).startswith(f"a.json: {message}")
    with pytest.raises(EngineError, match=r"^a\.json: an object expected, not 3$"):
        checked(Outer, 3, "a.json: ")


def test_dates_are_no_values(tmp_path):
    path = tmp_path / "a.toml"
    for value in ("2020-01-01", "10:00:00", "2020-01-01T10:00:00Z"):
        path.write_text(f"size = {value}\nshare = 1\n")
        with pytest.raises(EngineError, match="size: a valid integer expected"):
            checked(Inner, read_toml(path), "")


def test_a_server_needs_no_pydantic():
    """Triton's Python backend loads ONNX Runtime's engine where there is little else."""
    code = (
        "import sys; sys.modules.update(pydantic=None, onnx=None, tomlkit=None)\n"
        "import engine.backends.triton.python_model\n"
        "import engine.backends.onnxruntime.engine\n"
    )
    done = attempt("-c", code)
    assert (done.returncode, done.stderr) == (0, "")

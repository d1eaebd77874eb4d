"""The records of downloads: of a folder, and of a part of a file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.download.part import Part, Version
from harness.download.record import RECORD, load_record, save_record
from harness.errors import HarnessError
from tests.support.formats import Sample, damages

HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
URL = "http://localhost/model"
NOTE = Sample(
    {"url": URL, "size": 100, "etag": '"1"', "last_modified": "today"},
    nullable=frozenset({"size", "etag", "last_modified"}),
)


@given(st.dictionaries(st.text(max_size=9), HASH, max_size=4))
def test_a_record_comes_back(tmp_path_factory, record):
    folder = tmp_path_factory.getbasetemp()
    save_record(folder, record)
    assert load_record(folder) == record


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a/b.onnx": 1}', r'\["a/b\.onnx"\]: a valid string expected, not 1'),
        ('{"a": "12"}', 'a: a SHA-256 in hex expected, not "12"'),
        ('{"a": "12", "a": "12"}', 'the key "a" stands twice'),
        ("[]", "an object expected"),
        ("[" * 100_000, "in each other"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(HarnessError, match=rf"{RECORD}: .*{message}.*; it holds file names and"):
        load_record(tmp_path)
    assert load_record(tmp_path / "none") == {}


def part(folder, document):
    found = Part(folder / "model")
    found.path.write_bytes(b"x" * 50)
    found.path.with_name("model.part.json").write_text(json.dumps(document))
    return found


@given(damages(NOTE))
def test_a_part_with_a_damaged_note_is_none(tmp_path_factory, damage):
    assert part(tmp_path_factory.getbasetemp(), damage.document).version(URL, checked=True) is None


def test_a_part_with_its_note(tmp_path):
    found = part(tmp_path, NOTE.document)
    assert found.version(URL, checked=False) == Version(**NOTE.document)
    found.begin(Version(URL, 7, None, None))
    found.path.write_bytes(b"x")
    assert (
        found.version(URL, checked=True) is None
    )  # nothing tells whether it is still the same file


@given(st.binary(max_size=60) | st.from_regex(r'\{"[a-z]": ("[0-9a-f]{62,66}"|[0-9])\}'))
def test_record_is_hashes_by_name_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / RECORD).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        record = load_record(folder)
    except HarnessError as error:
        assert RECORD in str(error)
    else:
        assert all(len(bytes.fromhex(value)) == 32 for value in record.values())

"""The record of what was downloaded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.download.record import RECORD, load_record
from harness.errors import HarnessError


@given(st.binary(max_size=60) | st.from_regex(r'\{"[a-z]": ("[0-9a-f]{62,66}"|[0-9])\}'))
@settings(max_examples=60, deadline=None)
def test_record_is_hashes_by_name_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / RECORD).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        record = load_record(folder)
    except HarnessError as error:
        assert RECORD in str(error)
    else:
        assert all(len(bytes.fromhex(value)) == 32 for value in record.values())

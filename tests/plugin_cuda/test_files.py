"""Libraries and figures are whole files."""

from __future__ import annotations

from plugin_cuda.files import whole
from tests.support.writers import fail_to_write, write_at_once


def write(path, size):
    with whole(path) as temporary:
        temporary.write_bytes(b"%d," % size * (size // 7))


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path):
    found, either = write_at_once(write, tmp_path)
    assert found in either


def test_a_failing_writer_leaves_the_old_file(tmp_path, capfd):
    path = tmp_path / "library.so"
    path.write_bytes(b"old")
    assert "File too large" in fail_to_write(write, path, capfd)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

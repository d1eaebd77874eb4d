"""Writing a file: whole, or as it was."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from engine.errors import EngineError
from engine.support.files import whole_folder, write_atomically, write_json
from tests.support import ROOT
from tests.support.writers import fail_to_write, write_at_once


def write(path, size):
    head, values = b"%d," % size, np.full(size // 4, size, np.int32)
    write_atomically(path, head, values.data.cast("B"))


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path):
    found, either = write_at_once(write, tmp_path)
    assert found in either


def test_a_failing_writer_leaves_the_old_file(tmp_path, capfd):
    path = tmp_path / "cache.json"
    path.write_bytes(b"old")
    assert fail_to_write(write, path, capfd).endswith(f"File too large: '{path}'")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


OTHER = """
import sys
from pathlib import Path
from engine.support.files import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "other").touch()
    print("begun", flush=True)
    sys.stdin.readline()
    (folder / "second").touch()
"""


def test_two_writers_of_one_folder_leave_a_whole_one(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, tmp_path / "folder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as other:
        assert other.stdout.readline() == "begun\n"

        def write_beside():
            with whole_folder(tmp_path / "folder") as folder:
                assert not list(folder.iterdir())
                (folder / "mine").touch()
                other.communicate("\n")

        with pytest.raises(OSError, match=r"not empty.*/folder'"):
            write_beside()
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"other", "second"}
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


def test_json_with_what_json_has_no_word_for(tmp_path):
    path = tmp_path / "new" / "figures.json"
    write_json(path, {"a": [1.5, float("nan")], "b": {"c": float("inf")}, "d": "nan"})
    assert json.loads(path.read_bytes()) == {"a": [1.5, None], "b": {"c": None}, "d": "nan"}


def test_json_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"file/o.json: cannot write it: Not a directory|exists"):
        write_json(tmp_path / "file" / "o.json", {})

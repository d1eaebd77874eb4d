"""Writing the exported file."""

from __future__ import annotations

import onnx
import pytest

from export.onnx_export import save
from tests.support.writers import fail_to_write, write_at_once

pytestmark = pytest.mark.slow  # both start Python with PyTorch several times


def write(path, size):
    save(onnx.ModelProto(doc_string="x" * size), path)


def test_two_exports_to_one_file_leave_a_whole_one(tmp_path):
    found, either = write_at_once(write, tmp_path)
    assert found in either


def test_a_failing_export_leaves_the_old_file(tmp_path, capfd):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    said = fail_to_write(write, path, capfd)
    assert said == f"ExportError: {path}: cannot write (File too large)"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

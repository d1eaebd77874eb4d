"""Who writes whole files: in engine and harness `engine.support.files` alone."""

from __future__ import annotations

import ast

from tests.support import ROOT

WRITES = {"write_text", "write_bytes"}


def test_no_other_module_writes_a_file_at_once():
    """A reader, or a second writer, would meet half of it."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("engine", "harness")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in WRITES
    ]
    assert found == []

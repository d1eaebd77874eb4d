"""Our uses of TensorRT against the API of 10.16, 11.4 and TensorRT-RTX 1.7, without any of them."""

from __future__ import annotations

import ast
import json
from functools import cache

import pytest

from tests.support import trt_api
from tests.support.trt_api import RELEASES, missing, sources, uses

API = {
    "10.16": {"Builder": ["reset"], "BuilderFlag": ["INT8", "TF32"], "get_registry": []},
    "11.4": {"Builder": ["reset"], "BuilderFlag": ["TF32"], "get_registry": []},
    "rtx-1.7": {"Builder": ["reset"], "BuilderFlag": ["TF32"], "Extra": ["MORE"]},
}


@cache
def all_uses():
    return [use for path in sources() for use in uses(path.read_text(), path.name)]


def test_every_release_has_what_we_use():
    assert missing(all_uses(), trt_api.load()) == []


def test_reduced_copy_is_the_golden_data(golden):
    """Every use of the code was looked up in the full API; the copy holds nothing else."""
    assert trt_api.load() == trt_api.reduced(golden), "run: python -m tests.support.trt_api GOLDEN"
    full = {
        release: json.loads((golden / "trt_api" / file).read_text())
        for release, file in RELEASES.items()
    }
    assert missing(all_uses(), full) == []


def test_the_reader_sees_the_calls_that_matter():
    found = {(*use.owners, use.name) for use in all_uses()}
    for expected in (
        ("BuilderFlag", "TF32"),
        ("IPluginRegistry", "load_library"),
        ("IProgressMonitor", "step_complete"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "execute_async_v3"),
        ("ComputeCapability",),
        ("OnnxParser", "parse"),
    ):
        assert expected in found


@pytest.mark.parametrize(
    ("source", "problems"),
    [
        ("trt.BuilderFlag.TF32", []),
        ("trt.BuilderFlag.INT8", ["BuilderFlag has no 'INT8' in 11.4", "rtx-1.7"]),
        ("trt.get_registry()", ["the module has no 'get_registry' in rtx-1.7"]),
        ("trt.Extra.MORE", ["Extra", "Extra", "MORE", "MORE"]),
        ("rtx.Extra.MORE", []),
        ("b = trt.Builder()\nb.reset()\nb.rest()", ["Builder has no 'rest'"] * 3),
        ("def f(b: tensorrt.Builder | None):\n    c = b\n    c.rest()", ["'rest'"] * 3),
        ("class A:\n b: tensorrt.Builder\n def f(self):\n  self.b.rest()", ["'rest'"] * 3),
        (
            "class A:\n def __init__(self, b: tensorrt.Builder):\n  self._b = b\n"
            " def f(self):\n  self._b.rest()",
            ["'rest'"] * 3,
        ),
        ("class A(trt.Builder):\n def reset(self): ...", []),
        ("class A(trt.Builder):\n def rest(self): ...", ["'rest'"] * 3),
        ("class A:\n def f(self):\n  self._trt.Bilder", ["'Bilder'"] * 3),
        ("def f(b: tensorrt_rtx.Builder):\n    b.rest()", ["'rest' in rtx-1.7"]),
        ("other.Builder.rest", []),
    ],
)
def test_reader_on_small_sources(source, problems):
    found = missing(uses(source, "m.py"), API)
    assert len(found) == len(problems), found
    for sentence, part in zip(found, problems, strict=True):
        assert part in sentence


def test_what_only_rtx_has_runs_only_for_rtx():
    """A function that takes the module as ``rtx`` is called inside ``if ... == RTX`` only."""
    calls = 0
    for path in sources():
        tree = ast.parse(path.read_text())
        names = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and any(a.arg == "rtx" for a in node.args.args)
        }
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("== RTX")
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
                calls += 1
                assert id(node) in guarded, f"{path.name}:{node.lineno}"
    assert calls == 1


def test_tensorrt_is_imported_for_types_only():
    for path in sources():
        tree = ast.parse(path.read_text())
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                if {"tensorrt", "tensorrt_rtx"} & set(names):
                    assert id(node) in for_types, f"{path.name}:{node.lineno}"

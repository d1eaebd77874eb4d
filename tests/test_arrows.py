"""Which room imports which, no other arrow than these and no circle; and who writes files."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGES = ("export", "graph_surgery", "plugin_cuda", "engine", "harness")

BETWEEN_PACKAGES = {
    "export": "graph_surgery",
    "graph_surgery": "",
    "plugin_cuda": "",
    "engine": "graph_surgery plugin_cuda",
    "harness": "engine graph_surgery plugin_cuda",
}
"""Package to those that it may import."""

GROUND = {"engine": {"errors", "protocol", "support"}, "harness": {"errors", "command", "disk"}}
"""Rooms that every room of the package may import, but for one another."""

ARROWS = {
    "engine": {
        "errors": "",
        "support": "errors",
        "protocol": "errors",
        "data": "",
        "manifest": "",
        "model": "",
        "load": "",
        "speed": "",
        "auto": "backends load manifest model speed",
        "backends": "",
        "backends.onnxruntime": "backends model",
        "backends.tensorrt": "backends manifest model",
        "backends.cudnn": "backends model",
        "backends.triton": ("backends backends.onnxruntime data load manifest model"),
        "quantization": "backends.onnxruntime data model",
        "comparison": (
            "backends.cudnn backends.onnxruntime backends.tensorrt data load manifest model "
            "quantization"
        ),
        "inspect": "backends.tensorrt manifest model quantization",
        "report": "backends.tensorrt comparison quantization",
        "bench": (
            "backends backends.cudnn backends.onnxruntime backends.tensorrt comparison data load "
            "manifest model quantization speed"
        ),
        "plans": "backends.tensorrt manifest model",
        "cli": "comparison data inspect model plans quantization report",
        "__main__": "cli",
    },
    "harness": {
        "errors": "",
        "command": "errors",
        "disk": "errors",
        "lock": "",
        "artefacts": "",
        "data": "artefacts lock",
        "download": "data lock",
        "loadgen": "",
        "results": "data loadgen lock",
        "predict": "data results",
        "triton": "loadgen",
        "make": "artefacts data loadgen results triton",
        "submission": "data loadgen results",
        "doctor": "triton",
        "bench": "data loadgen results triton",
        "cli": "data doctor download loadgen lock make predict results submission triton",
        "__main__": "cli",
    },
}
"""Room to the rooms of its package that it imports, besides `GROUND`."""


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else str(node.module))
    return {name for name in names if name.partition(".")[0] in PACKAGES}


def room(module: str) -> str:
    """The sub-package of a module within its package, or the module itself where it has none."""
    _, *parts = module.split(".")
    depth = 2 if parts[:1] == ["backends"] and len(parts) > 2 else 1
    return ".".join(parts[:depth])


def arrows(package: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module.startswith(f"{package}."):
            inside = {room(one) for one in imported(path) if one.startswith(f"{package}.")}
            found.setdefault(room(module), set()).update(inside - {room(module)})
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages(package):
    seen = {
        one.partition(".")[0]
        for module, path in MODULES.items()
        if module.partition(".")[0] == package
        for one in imported(path)
    }
    assert seen - {package} == set(BETWEEN_PACKAGES[package].split())


@pytest.mark.parametrize("package", ARROWS)
def test_rooms(package):
    ground = GROUND[package]
    known = ARROWS[package]
    found = arrows(package)
    assert found.keys() - {""} == known.keys()
    for name, targets in found.items():
        allowed = set(known.get(name, "").split())
        assert targets - ground - allowed == set(), f"{package}.{name} imports another room"
        assert allowed <= targets, f"{package}.{name} no longer imports {allowed - targets}"
    tuple(TopologicalSorter(found).static_order())  # raises CycleError for a circle
    assert not any(targets - ground for name, targets in found.items() if name in ground)


def test_the_list_of_detectors_alone_knows_them():
    """What loads and exports works from the description of a detector."""
    detectors = ("export.retinanet", "export.ssd_resnet34")
    knowing = {
        module
        for module, path in MODULES.items()
        if module.startswith("export.") and not module.startswith(detectors)
        if any(one.startswith(detectors) for one in imported(path))
    }
    assert knowing == {"export.architectures"}


def test_only_export_needs_torch_to_be_imported():
    """And no module imports what is heavy or optional before it is needed."""
    heavy = {"torch", "tensorrt", "tensorrt_rtx", "cudnn", "tritonclient", "cuda"}
    for module, path in MODULES.items():
        for node in tree(path).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            found = {name.partition(".")[0] for name in names} & heavy
            assert found <= ({"torch"} if module.startswith("export.") else set()), module


def test_files_alone_writes_a_file_at_once():
    """In engine and harness: a reader, or a second writer, would meet half of it."""
    found = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        if module.startswith(("engine.", "harness."))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in {"write_text", "write_bytes"}
    ]
    assert found == []

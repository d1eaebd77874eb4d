"""What our code uses of TensorRT's Python API, read from its source, and what each release has.

Roots in the source: a value called ``trt`` is the module of any backend, and an annotation
``tensorrt.X`` a type of any; ``rtx`` and ``tensorrt_rtx.X`` are TensorRT-RTX alone. A variable is
of a type when its annotation, or the assignment from a variable of that type, says so.

``python -m tests.support.trt_api GOLDEN`` writes the reduced copy of the golden data
that the tests read.
"""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

REDUCED = ROOT / "tests" / "data" / "trt_api.json"

RELEASES = {
    "10.16": "tensorrt_10_16.json",
    "11.4": "tensorrt_11_4.json",
    "rtx-1.7": "tensorrt_rtx_1_7.json",
}
"""Release to its file in the golden data."""

SCOPES = {
    "trt": frozenset(RELEASES),
    "tensorrt": frozenset(RELEASES),
    "rtx": frozenset({"rtx-1.7"}),
    "tensorrt_rtx": frozenset({"rtx-1.7"}),
}
"""Root to the releases that must have what is used through it."""


@dataclass(frozen=True, order=True)
class Use:
    """A name of the API that ``releases`` must have.

    ``owners`` are the classes of which one must have it; none: it is a name of the module.
    """

    owners: tuple[str, ...]
    name: str
    releases: frozenset[str]
    where: str


def sources():
    """Modules of the engine that touch TensorRT, but for the bench of calibrators.

    Those went with release 11; the bench says so.
    """
    files = sorted(set((ROOT / "engine").rglob("*.py")) - {ROOT / "engine/bench/calibrators.py"})
    return [path for path in files if uses(path.read_text(), path.name)]


def uses(source, name):
    """Every use of the API in a module."""
    reader = _Reader(name)
    reader.visit(ast.parse(source))
    return reader.found


def missing(found, api):
    """Uses that a release which must have them lacks, as sentences."""
    problems = []
    for use in found:
        for release in sorted(use.releases):
            members = api[release]
            known = {name for owner in use.owners for name in members.get(owner, ())}
            if use.name not in (known if use.owners else members):
                owner = " and ".join(use.owners) or "the module"
                problems.append(f"{use.where}: {owner} has no {use.name!r} in {release}")
    return problems


def reduced(golden):
    """The part of the golden data that `sources` use: release, name of the module, members."""
    found = [use for path in sources() for use in uses(path.read_text(), path.name)]
    api = {}
    for release, file in RELEASES.items():
        full = json.loads((golden / "trt_api" / file).read_text())
        names = {name for use in found for name in (use.owners or (use.name,))}
        api[release] = {
            name: sorted({use.name for use in found if name in use.owners} & set(full[name]))
            for name in sorted(names & full.keys())
        }
    return api


class _Reader(ast.NodeVisitor):
    def __init__(self, where):
        self.where = where
        self.found = []
        self.types = [{}]  # a dictionary per scope: variable -> (class, releases)
        self.fields = {}  # attribute of self -> (class, releases)

    def visit_ClassDef(self, node):
        bases = [self.type_of(base) for base in node.bases]
        bases = [base for base in bases if base is not None]
        fields, self.fields = self.fields, {}
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and (kind := self.annotated(item.annotation)):
                self.fields[item.target.id] = kind
            if isinstance(item, ast.FunctionDef) and bases and not item.name.startswith("_"):
                # TensorRT would never call a method that no base has
                owners = tuple(base for base, _ in bases)
                self.use(owners, item.name, bases[0][1], item)
        self.generic_visit(node)
        self.fields = fields

    def visit_FunctionDef(self, node):
        self.types.append({})
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if argument.annotation and (kind := self.annotated(argument.annotation)):
                self.types[-1][argument.arg] = kind
        self.generic_visit(node)
        self.types.pop()

    def visit_AnnAssign(self, node):
        if (kind := self.annotated(node.annotation)) and isinstance(node.target, ast.Name):
            self.types[-1][node.target.id] = kind
        self.generic_visit(node)

    def visit_Assign(self, node):
        if kind := self.type_of(node.value):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.types[-1][target.id] = kind
                elif isinstance(target, ast.Attribute) and is_self(target.value):
                    self.fields[target.attr] = kind
        self.generic_visit(node)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if node.attr.startswith("__"):
            return
        if releases := self.module(node.value):
            self.use((), node.attr, releases, node)
        elif kind := self.type_of(node.value):
            self.use((kind[0],), node.attr, kind[1], node)

    def use(self, owners, name, releases, node):
        self.found.append(Use(owners, name, releases, f"{self.where}:{node.lineno}"))

    def module(self, node):
        """Releases behind ``trt``, ``self._trt`` and their like; None for anything else."""
        if isinstance(node, ast.Name):
            return SCOPES.get(node.id)
        if isinstance(node, ast.Attribute) and is_self(node.value):
            return SCOPES.get(node.attr.lstrip("_"))
        return None

    def annotated(self, node):
        """Class of an annotation such as ``tensorrt.ICudaEngine | None``."""
        if isinstance(node, ast.BinOp):
            return self.annotated(node.left) or self.annotated(node.right)
        return self.type_of(node) if isinstance(node, ast.Attribute) else None

    def type_of(self, node):
        """(class, releases) of an expression, where the source says it."""
        if isinstance(node, ast.Attribute):
            if releases := self.module(node.value):
                return node.attr, releases
            return self.fields.get(node.attr) if is_self(node.value) else None
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self.types) if node.id in s), None)
        if isinstance(node, ast.Call) and self.module(getattr(node.func, "value", None)):
            name = node.func.attr
            return (name, self.module(node.func.value)) if name[0].isupper() else None
        return None


def is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"


def load():
    """The reduced copy."""
    return json.loads(REDUCED.read_text())


if __name__ == "__main__":
    REDUCED.write_text(json.dumps(reduced(Path(sys.argv[1])), indent=1) + "\n")

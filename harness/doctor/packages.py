"""The packages that the project declares, and which of them are installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from engine.support.environment import distribution

PROJECT = "ssd-resnet34-trt"


@dataclass(frozen=True)
class Package:
    """A package that the project declares.

    Attributes
    ----------
    name
        Its name on PyPI, or that of an installed one that stands in for it.
    required
        Versions that the project takes, as ``>=1.26``; empty: any.
    installed
        The version here; None: not installed.
    fits
        Whether the installed version is one of them.
    """

    name: str
    required: str
    installed: str | None
    fits: bool


def declared_packages() -> dict[str, tuple[Package, ...]]:
    """Compare what is installed with what the project's metadata declare.

    Returns
    -------
    groups
        The dependencies under the empty string, then each extra under its name. Empty when the
        project itself is not installed.
    """
    try:
        project = metadata.metadata(PROJECT)
    except metadata.PackageNotFoundError:
        return {}
    declared = metadata.requires(PROJECT) or []
    extras = project.get_all("Provides-Extra") or []
    return {
        extra: tuple(_package(one) for one in _requirements(declared, extra))
        for extra in ("", *extras)
    }


def _requirements(declared: list[str], extra: str) -> Iterator[Requirement]:
    """Yield what an extra adds to the dependencies, an extra within it resolved."""
    for text in declared:
        try:
            one = Requirement(text)
        except InvalidRequirement:
            continue
        wanted = one.marker is None or one.marker.evaluate({"extra": extra})
        if not wanted or (extra and (one.marker is None or one.marker.evaluate({"extra": ""}))):
            continue
        if one.name == PROJECT:
            for inner in sorted(one.extras):
                yield from _requirements(declared, inner)
        else:
            yield one


def _package(wanted: Requirement) -> Package:
    name, version = distribution(wanted.name)
    fits = version is not None and _fits(wanted, version)
    return Package(name, str(wanted.specifier), version, fits)


def _fits(wanted: Requirement, version: str) -> bool:
    try:
        return wanted.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False

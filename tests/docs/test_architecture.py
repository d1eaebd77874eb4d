"""The documents' rooms are those of tests/test_arrows.py; the files that they name are there."""

import re
from importlib.util import find_spec

import pytest

from tests.support import ROOT
from tests.test_arrows import ARROWS, BETWEEN_PACKAGES, GROUND

ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
OURS = "data_maps|demo|docs|engine|export|graph_surgery|harness|plugin_cuda|tests"


def read_rooms(text: str, title: str) -> dict[str, set[str]]:
    """Read the table under a title: its first column, and the names in its last one."""
    section = text.split(f"# {title}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `([\w/.]+)` \| .* \| (.*) \|$", section, re.MULTILINE)
    names = {room: re.findall(r"[\w/]+", targets) for room, targets in rows}
    return {room: {one.replace("/", ".") for one in found} for room, found in names.items()}


@pytest.mark.parametrize("package", ARROWS)
def test_rooms_of_a_package(package):
    text = ARCHITECTURE.read_text()
    written = read_rooms(text, package)
    assert all((ROOT / package / room).exists() for room in written)
    rooms = {
        room.strip("/").removesuffix(".py").replace("/", "."): t for room, t in written.items()
    }
    assert rooms == {
        room: set(targets.split())
        for room, targets in ARROWS[package].items()
        if room != "__main__"
    }
    section = text.split(f"# {package}\n", 1)[1]
    ground = re.search(r"Every room may also import (.*)\.", section)
    assert set(re.findall(r"`(\w+)`", ground[1])) == GROUND[package]


def test_packages():
    written = read_rooms((ROOT / "README.md").read_text(), "Rooms")
    packages = {
        room.strip("/"): targets & BETWEEN_PACKAGES.keys() for room, targets in written.items()
    }
    del packages["demo"]
    assert packages == {name: set(t.split()) for name, t in BETWEEN_PACKAGES.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [one for one in links if not (page.parent / one).exists()] == []
    paths = re.findall(rf"(?<![\w./-])(?:{OURS})/[\w./*-]*[\w*]", text)
    assert [one for one in paths if not [*ROOT.glob(one.replace("NAME", "*"))]] == []
    modules = re.findall(r"python3? -m ([\w.]*\w)", text)
    assert [one for one in modules if find_spec(one) is None] == []

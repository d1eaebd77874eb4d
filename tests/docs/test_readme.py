"""The commands of the README and of docs/*.md are run, or their source says why not.

What a fenced block is follows from its language: ``sh`` blocks are run from top to bottom, ``toml``
blocks are settings of ``harness run``, ``text`` blocks are for people. A comment before a block,
``<!-- not run: needs the network -->``, takes it out; `REASONS` are the reasons there are, and
pytest lists what was taken out as skipped.

The commands run as they are written, in a folder that looks like the project's, but for
`SUBSTITUTIONS` and these stand-ins: the COCO data are a few images of the demo set, photos/ has the
same, the weights are the demo checkpoint's, and .venv is the environment of the tests.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from markdown_it import MarkdownIt

from harness.loadgen.settings import load_settings
from tests.support import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
REASONS = ("needs a GPU", "needs the network", "needs another program")
MARKER = re.compile(rf"<!-- not run: ({'|'.join(REASONS)})(: [^<>]+)? -->\n*")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PROGRAMS = {*SCRIPTS, "polygraphy", "make", "."}
IMAGES = {"val": 12, "cal": 8}

SUBSTITUTIONS = {
    # the demo model takes 400x400 images
    r"1200x1200": "400x400",
    # less work
    r"--random 4": "--random 1",
    r"--images 100": "--images 8",
    r"^(engine sensitivity .*)$": r"\1 --images 1",
    # so few images say little about the mAP: that it differs is an answer, too
    r"^(engine compare .* --annotations .*)$": r"\1 || [ $? -eq 1 ]",
    r"^(harness run .*)$": r"\1 --min-duration 0.3 --min-queries 4",
    # the libraries of the other tests, built already
    r"^build-plugin$": "build-plugin --arch 80,90 -o $(realpath build/plugins)",
    # what the reader is to fill in
    r"build/logs/<time>": "build/logs/*/",
    r"^(harness accuracy) (mlperf_log_accuracy.json)": (
        r"\1 $(ls build/logs/*/*/ssd-resnet34/Offline/AccuracyOnly/\2 | tail -1)"
    ),
}
"""Regular expressions and what replaces them in the commands, one command a line."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, its language, its text, and why it is not run."""

    place: str
    language: str
    text: str
    reason: str | None

    @property
    def commands(self):
        """One command a line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if shlex.split(line, comments=True)]


def read_blocks(text, name):
    """Blocks of a page; complains about one that does not say what it is."""
    blocks, reason = [], None
    for token in MarkdownIt().parse(text):
        place = f"{name}:{token.map[0] + 1}" if token.map else name
        assert token.type != "code_block", f"{place}: an indented block; fence it"
        if token.type == "fence":
            assert token.info in {"sh", "toml", "text"}, f"{place}: a block of no known language"
            blocks.append(Block(place, token.info, token.content, reason))
        marked = token.type == "html_block" and "not run" in token.content
        if marked:
            assert MARKER.fullmatch(token.content), f"{place}: reasons are {', '.join(REASONS)}"
        reason = token.content.split("not run: ")[1].split(" -->")[0] if marked else None
    for block in blocks:
        if block.language == "sh" and not block.reason:
            for command in block.commands:
                program = shlex.split(command)[0]
                assert program in PROGRAMS, (
                    f"{block.place}: cannot run {program!r} here; mark the block as not run"
                )
    return blocks


def blocks_of_pages():
    return [block for page in PAGES for block in read_blocks(page.read_text(), page.name)]


def substitute(command):
    for pattern, replacement in SUBSTITUTIONS.items():
        command = re.sub(pattern, replacement, command)
    return command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like the project's, with the stand-ins."""
    place = tmp_path_factory.mktemp("readme")
    tracked = ("Makefile", "README.md", "configs", "constraints.txt", "demo", "docs", "engine")
    for name in (*tracked, "export", "graph_surgery", "harness", "plugin_cuda", "pyproject.toml"):
        if (ROOT / name).exists():
            (place / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "data_maps", place / "data_maps")
    coco = place / "build" / "data" / "coco"
    for split, folder in (("val", "val2017"), ("cal", "train2017")):
        names = (ROOT / "data_maps" / "demo" / f"{split}_map.txt").read_text().split()
        names = names[: IMAGES[split]]
        (place / "data_maps" / "coco" / f"{split}_map.txt").write_text("\n".join(names) + "\n")
        (coco / folder).mkdir(parents=True)
        for name in names:
            shutil.copy(ROOT / "demo" / "data" / split / name, coco / folder)
    truth = json.loads((ROOT / "demo/data/annotations/instances_val.json").read_text())
    shown = {path.name for path in (coco / "val2017").iterdir()}
    truth["images"] = [one for one in truth["images"] if one["file_name"] in shown]
    ids = {one["id"] for one in truth["images"]}
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in ids]
    (coco / "annotations").mkdir()
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
    photos = place / "photos"  # of the data set of one's own
    photos.mkdir()
    for link, folder in (("val", "val2017"), ("cal", "train2017")):
        (photos / link).symlink_to(coco / folder)
    (photos / "instances.json").symlink_to(coco / "annotations" / "instances_val2017.json")
    weights = place / "build" / "models" / "ssd-resnet34" / "resnet34-ssd1200.pytorch"
    weights.parent.mkdir(parents=True)
    shutil.copy(ROOT / "demo" / "ssd-resnet34-demo.safetensors", weights)
    programs = place / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, target in SCRIPTS.items():
        package = target.partition(".")[0]
        script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {package} "$@"\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    # not a link to Python, which would look for its packages beside the link
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "python").chmod(0o755)
    (programs / "polygraphy").symlink_to(Path(sys.executable).with_name("polygraphy"))
    (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
    (place / ".venv" / "installed").touch()
    return place


def run(block, place):
    script = "\n".join(substitute(command) for command in block.commands)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        env={
            **{name: value for name, value in os.environ.items() if name != "BUILD_DIR"},
            "PATH": f"{place / '.venv' / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = f"{block.place}\n{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    for name in re.findall(r" -o (\S+)", block.text):
        assert (place / name).exists(), f"{block.place}: no {name} was written"


def needs_plugin(block):
    return "build-plugin" in block.text or "plugins/" in block.text


BLOCKS = blocks_of_pages()
RUN = [block for block in BLOCKS if block.language == "sh" and not block.reason]


@pytest.fixture(scope="module")
def done(place):
    """The folder after all commands that need no plugin library."""
    for block in RUN:
        if not needs_plugin(block):
            run(block, place)
    return place


@pytest.mark.slow
def test_commands(done):
    """They end well and leave a model, its INT8 form, and valid and evaluated runs."""
    onnx.checker.check_model(str(done / "ssd-resnet34.nms.onnx"))
    assert (done / "ssd-resnet34.int8.onnx").exists()
    results = [json.loads(path.read_text()) for path in done.glob("build/logs/**/result.json")]
    assert {one["scenario"] for one in results} >= {"Offline", "Server"}
    accuracies = [one["accuracy"] for one in results if one["mode"] == "AccuracyOnly"]
    assert accuracies
    for accuracy in accuracies:
        assert accuracy["images_seen"] == accuracy["images_total"] == IMAGES["val"]


@pytest.mark.parametrize(
    "failing", ["harness report no-such-folder", "false | true", "false\ntrue"]
)
def test_command_that_fails(place, failing):
    with pytest.raises(AssertionError, match=r"here\.md:7"):
        run(Block("here.md:7", "sh", failing, None), place)


def test_commands_with_the_plugin(done, trt_plugin_library):
    if find_spec("tensorrt_rtx_libs") is None:  # importing it here would keep the engine from it
        pytest.skip("needs TensorRT-RTX")
    blocks = [block for block in RUN if needs_plugin(block)]
    assert blocks
    (done / "build" / "plugins").symlink_to(trt_plugin_library.parent)
    for block in blocks:
        run(block, done)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason], ids=lambda block: block.place)
def test_not_run(block):
    """For the list of what is not run; the commands must exist all the same."""
    for command in block.commands:
        program = shlex.split(command)[0]
        assert program in PROGRAMS or block.reason.startswith(REASONS[1:]), program
    pytest.skip(f"{block.reason}: {'; '.join(block.commands)}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=str)
def test_settings(block, tmp_path):
    """A ``toml`` block says what the settings are."""
    (tmp_path / "settings.toml").write_text(block.text)
    given = tomllib.loads(block.text)
    (server,) = load_settings(["Server"], tmp_path / "settings.toml", {})
    for name, value in given.pop("Server", {}).items() | given.items():
        assert getattr(server, name) == value


def test_every_substitution_is_used():
    commands = [command for block in RUN for command in block.commands]
    for pattern in SUBSTITUTIONS:
        assert any(re.search(pattern, command) for command in commands), pattern


FENCE = "```{}\n{}\n```\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (FENCE.format("", "make demo"), "README.md:1: a block of no known language"),
        (FENCE.format("bash", "make demo"), "no known language"),
        ("text\n\n    make demo\n", "README.md:3: an indented block"),
        (FENCE.format("sh", "curl x"), "README.md:1: cannot run 'curl' here"),
        (FENCE.format("sh", "make demo\n# why\nA=1 make x"), "cannot run 'A=1'"),
        ("<!-- not run: too slow -->\n" + FENCE.format("sh", "make demo"), "reasons are"),
        ("<!-- not run: needs a GPU -->\n\ntext\n\n" + FENCE.format("sh", "curl x"), "'curl'"),
    ],
)
def test_block_that_does_not_say_what_it_is(text, complaint):
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        read_blocks(text, "README.md")


def test_marker():
    marker = "<!-- not run: needs the network: CI does -->\n"
    text = marker + FENCE.format("sh", "curl \\\n  x") + FENCE.format("sh", "make demo")
    first, second = read_blocks(text, "README.md")
    assert first.reason == "needs the network: CI does"
    assert [line.split() for line in first.commands] == [["curl", "x"]]
    assert second.reason is None

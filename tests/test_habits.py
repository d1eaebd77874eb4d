"""What a command line is expected to do, of every command and option of the project."""

from __future__ import annotations

import re
import sys
from importlib import import_module, metadata
from itertools import pairwise

import pytest
import typer.main

COMMANDS = {
    "export-onnx": "export.cli",
    "graph-surgery": "graph_surgery.cli",
    "engine": "engine.cli",
    "harness": "harness.cli.main",
    "build-plugin": "plugin_cuda.cli",
}


def leaves(command, path=()):
    """Every command below one, with the words that lead to it."""
    yield path, command
    for name, one in getattr(command, "commands", {}).items():
        yield from leaves(one, (*path, name))


EVERY = [
    pytest.param(module, path, command, id=" ".join((program, *path)))
    for program, module in COMMANDS.items()
    for path, command in leaves(typer.main.get_command(import_module(module).app))
]


@pytest.fixture
def call(monkeypatch, capsys):
    def call(module, *words):
        """Exit code, and what was said on both streams."""
        program = next(name for name, one in COMMANDS.items() if one == module)
        monkeypatch.setattr(sys, "argv", [program, *words])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as end:
            import_module(module).main()
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
def test_version(module, call):
    code, said, _ = call(module, "--version")
    program = next(name for name, one in COMMANDS.items() if one == module)
    assert (code, said) == (0, f"{program} {metadata.version('ssd-resnet34-trt')}\n")


@pytest.mark.parametrize(("module", "path", "command"), EVERY)
def test_help_names_every_option_at_80_columns(module, path, command, call, monkeypatch):
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    code, said, _ = call(module, *path, "-h")
    assert code == 0
    assert said == call(module, *path, "--help")[1]
    assert max(map(len, said.splitlines())) <= 80
    for option in command.params:
        for name in option.opts:
            if name.startswith("-"):
                assert re.search(rf"(?<![\w-]){name}(?![\w-])", said), name
    assert "…" not in said


def test_paragraphs_of_the_help_fill_their_lines(call, monkeypatch):
    """At the width of the terminal, not at that of the source."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    _, said, _ = call("harness.cli.main", "run", "--help")
    text = said.split("╭")[0]
    paragraph = next(one for one in re.split(r"\n\s*\n", text) if "LOG_DIR" in one)
    lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
    assert len(lines) > 2
    for line, following in pairwise(lines):
        assert len(line) + len(following.split()[0]) >= 76, (line, following)


@pytest.mark.parametrize(("module", "path", "command"), EVERY)
def test_every_option_has_both_spellings(module, path, command, call, tmp_path):
    """Each is understood: what follows it, an option that there is not, is what is refused."""
    if hasattr(command, "commands"):
        return
    for option in command.params:
        for name in option.opts:
            if not name.startswith("--") or not re.search(r"\w[-_]", name[2:]):
                continue
            if "completion" in name:  # which are taken as they come
                continue
            words = name[2:].replace("_", "-").split("-")
            for spelling in ("--" + "-".join(words), "--" + "_".join(words)):
                given = [spelling] if option.is_flag else [f"{spelling}=1"]
                code, _, error = call(module, *path, *given, "--none-such")
                assert code == 2 and "none-such" in error, spelling


@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
def test_completion(module, call, monkeypatch):
    """Of a shell: it asks the command what could follow."""
    program = next(name for name, one in COMMANDS.items() if one == module)
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    monkeypatch.setenv(variable, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"{program} --ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, said, _ = call(module)
    assert (code, said.split()) == (0, ["--version"])


def test_a_path_that_is_in_the_checkout_alone(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = call("graph_surgery.cli", "inspect", "demo/data/none.onnx")
    assert code == 2 and "is not here" not in error
    code, _, error = call("graph_surgery.cli", "inspect", "demo/data/val/000000001969.jpg")
    assert code == 2 and len(error.splitlines()) == 1
    assert "; demo/data/val/000000001969.jpg is not here, but in " in error

"""The words that the make targets take, and the targets that need no model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import harness.make.route
from harness.cli.main import main
from harness.errors import HarnessError
from harness.make.arguments import run_args
from harness.make.route import build_engine, route_of
from harness.make.targets import TARGETS
from tests.support.small_benchmark import BENCHMARK, ROOT


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--benchmarks=resnet50", ("'resnet50'", "ssd-resnet34", "ssd-resnet34-demo")),
        ("--scenarios=Offline,Batch", ("'Batch'", "Offline", "Server", "SingleStream")),
        ("--test_mode FindPeak", ("'FindPeak'", "PerformanceOnly", "AccuracyOnly")),
        ("--config_ver=best", ("'best'", "default", "triton", "maxq")),
        ("--gpu_only", ("'--gpu_only'", "--benchmarks", "--scenarios", "--fast")),
        ("offline", ("'offline'", "--benchmarks")),
    ],
)
def test_unknown_words(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["harness", "make", "run", *arguments.split()])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: error: unknown ")
    assert all(word in line for word in words)


def test_words_in_any_case_and_order():
    arguments = run_args(
        benchmarks=f"ssd-resnet34,{BENCHMARK}",
        scenarios="multistream,OFFLINE,Offline",
        test_mode="accuracyonly",
        config_ver="MaxQ",
        system=None,
        fast=False,
        devices="0,2",
        url="a:1, b:2",
        streams=3,
    )
    assert (arguments.devices, arguments.streams) == ((0, 2), 3)
    assert arguments.urls == ("a:1", "b:2")
    assert arguments.benchmarks == ("ssd-resnet34", BENCHMARK)
    assert arguments.scenarios == ("MultiStream", "Offline")
    assert (arguments.modes, arguments.version) == (("AccuracyOnly",), "maxq")


def test_help_and_makefile_name_every_target(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness", "make", "--help"])
    with pytest.raises(SystemExit):
        main()
    words = re.findall(r"\w+", capsys.readouterr().out)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (phony,) = re.findall(r"\.PHONY: (.*)", makefile)
    for target in TARGETS:
        assert target in words
        assert target in {*phony.split(), "onnx"}


PIP = """#!/bin/sh
echo begin >> said; sleep 0.5; echo "end $*" >> said
"""
VENV = f"""#!/bin/sh
mkdir -p .venv/bin
printf '%s' '{PIP}' > .venv/bin/pip
chmod +x .venv/bin/pip
"""


def test_two_makes_install_one_after_the_other(tmp_path):
    """The first two in a checkout; the second finds that all is done."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(VENV)
    (tmp_path / "python").chmod(0o755)
    command = ["make", ".venv/test", "PYTHON=./python", "BUILD_DIR=build"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(2)]
    outputs = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split()[0] for line in said] == ["begin", "end"] * 2
    assert [line.split()[-1] for line in said if "end" in line] == ["tox", ".[test]"]
    os.utime(tmp_path / "pyproject.toml")
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert len((tmp_path / "said").read_text().splitlines()) == 8


def test_make_help_lists_every_target_that_is_for_people():
    done = subprocess.run(
        ["make", "-f", ROOT / "Makefile"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    listed = set(re.findall(r"^  ([a-z_ -]+?)  ", done.stdout, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (phony,) = re.findall(r"\.PHONY: (.*)", makefile)
    inner = {"lint_python", "lint_types", "lint_cuda"}
    assert {word for words in listed for word in words.split()} == set(phony.split()) - inner
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_image_size_and_entry_go_from_make_to_the_route(monkeypatch):
    show = "--eval=show: ; @echo $$IMAGE_SIZE $$ENTRY $$WEIGHTS"
    given = ["IMAGE_SIZE=512", "WEIGHTS=my.pth", "ENTRY=ema"]
    command = ["make", "-f", ROOT / "Makefile", show, "show", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    size, entry, weights = done.stdout.split()
    monkeypatch.setenv("IMAGE_SIZE", size)
    monkeypatch.setenv("ENTRY", entry)
    monkeypatch.setenv("WEIGHTS", weights)
    asked = {}

    def route_of(benchmark, weights, *_, **given):
        asked.update(given, weights=weights)
        raise HarnessError("enough")

    monkeypatch.setattr("harness.make.route.route_of", route_of)
    monkeypatch.setattr(sys, "argv", ["harness", "make", "onnx", "--benchmarks", BENCHMARK])
    with pytest.raises(SystemExit):
        main()
    expected = {"dataset": None, "image_size": 512, "entry": "ema", "weights": Path("my.pth")}
    assert asked == expected


SHOW = """#!/bin/sh
printf '[%s]' "$@" >> said; echo >> said
"""


@pytest.fixture
def said(tmp_path):
    """What `make` runs instead of the project: gives the words of each command, in brackets."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for folder in (".venv", "bin", "a b"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".venv" / "installed").touch()
    (tmp_path / "bin" / "python").write_text(SHOW)
    (tmp_path / "bin" / "python").chmod(0o755)

    def run(*arguments):
        command = ["make", "-f", ROOT / "Makefile", "BIN=bin", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return (tmp_path / "said").read_text().splitlines()[-1]

    return run


def test_result_json_is_given_a_command_that_names_the_weights(said):
    """The command that runs is what result.json has; RUN_ARGS come last and win."""
    given = ["WEIGHTS=a b/my.pth", "IMAGE_SIZE=512", "ENTRY=ema"]
    options = "[--weights][a b/my.pth][--image-size][512][--entry][ema]"
    assert said("run", "RUN_ARGS=--fast", *given) == f"[-m][harness][make][run]{options}[--fast]"
    assert said("run", "RUN_ARGS=--fast") == "[-m][harness][make][run][--fast]"


@pytest.mark.parametrize(
    ("images", "words"),
    [("a b", "[a b]"), ("bin .venv", "[bin][.venv]"), ("'a b' bin", "[a b][bin]")],
)
def test_predict_takes_a_folder_with_a_space_and_several_places(said, images, words):
    assert said("predict", f"IMAGES={images}").endswith(f".nms.onnx]{words}")


def make(*arguments):
    command = ["make", "-n", "-B", "-f", ROOT / "Makefile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("folder", ["a b", " ", ""])
def test_a_build_folder_that_make_cannot_name_is_refused(folder):
    done = make("demo", f"BUILD_DIR={folder}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "name a folder without spaces" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_recipe_removes_what_a_variable_names():
    """Two `make` at once, or a variable that says something else, would lose another's files."""
    done = make("demo", "bench", "bench_nms", "build_plugins", "triton_server", "run", "test")
    assert done.returncode == 0, done.stderr
    assert "harness run" in done.stdout
    assert not re.search(r"\brm\b", done.stdout)


def test_a_failing_command_ends_the_route(tmp_path, monkeypatch, capfd):
    weights = tmp_path / "weights.onnx"
    weights.write_bytes(b"no ONNX")
    command = ["make", "onnx", "--weights", str(weights), "--build-dir", str(tmp_path / "build")]
    monkeypatch.setattr(sys, "argv", ["harness", *command])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    reason, last = capfd.readouterr().err.splitlines()
    assert reason.startswith("graph-surgery: error: ")
    assert last.startswith("harness: error: python -m graph_surgery failed with exit code 2")
    assert not list((tmp_path / "build" / "onnx").iterdir())


def test_engines_of_a_built_backend(tmp_path, monkeypatch):
    """One file for each batch; a new plugin makes it again. The builder itself is a stand-in."""
    model, plugin = tmp_path / "model.onnx", tmp_path / "plugins" / "libnmsoptplugin.so"
    model.write_bytes(b"graph")
    calls, lines = [], []

    def build(model, backend, output, options):
        calls.append((options.max_batch, options.best_batch, options.plugins))
        output.write_bytes(b"plan")

    trt = SimpleNamespace(__version__="11.4")
    monkeypatch.setattr("engine.backends.tensorrt.module.import_tensorrt", lambda _: trt)
    monkeypatch.setattr("engine.backends.tensorrt.build.build", build)
    monkeypatch.setattr("engine.model.load_detector", lambda path: path)
    route = route_of(BENCHMARK, None, tmp_path, lines.append)
    first = build_engine(route, model, "tensorrt", 64)
    assert build_engine(route, model, "tensorrt", 64) == first
    second = build_engine(route, model, "tensorrt", 8)
    assert first != second
    assert calls == [(64, 64, ()), (8, 8, ())]
    plugin.parent.mkdir()
    plugin.write_bytes(b"library")
    build_engine(route, model, "tensorrt", 8)
    assert calls[2:] == [(8, 8, (plugin,))]
    assert "rebuilding because plugin changed" in lines[-1]
    trt.__version__ = "11.5"
    build_engine(route, model, "tensorrt", 8)
    assert "rebuilding because backend changed" in lines[-1]


def test_fast_is_nvidias():
    """--fast of the v2.0 submissions: min_duration 60 s, min_query_count 1."""
    from harness.loadgen.settings import settings_from
    from harness.make.arguments import FAST

    for setting in settings_from({"min_duration_ms": 5}, ("Offline", "Server"), FAST):
        assert (setting.min_duration_ms, setting.min_query_count) == (60_000, 1)


@pytest.mark.parametrize("pattern", ["engine/no_such.py", "no_such/*.py"])
def test_code_that_is_not_there_is_an_error(pattern):
    """A file that moved would else be watched no longer, and nobody would know."""
    with pytest.raises(HarnessError, match=rf"{re.escape(pattern)}: no such file"):
        harness.make.route.code_sha256("engine/data/coco.py", pattern)

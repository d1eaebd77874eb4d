"""Errors of the engine command are one line; its help is quick."""

from __future__ import annotations

import sys

import onnx
import pytest

from engine.cli import app, main
from engine.data.preprocessed import preprocessing_sha256
from engine.quantization.cache import Calibration
from harness.command import run_command as run_harness
from tests.support import attempt
from tests.support.int8_models import write_int8

COMMANDS = ["calibrate", "quantize", "build", "compare", "sensitivity", "inspect"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a.onnx", "b.onnx"], "give either --data FOLDER or --random N"),
        (["compare", "a.onnx", "b.onnx", "--data", "d", "--random", "2"], "give either"),
        (["compare", "a.onnx", "b.onnx", "--random", "2", "--images", "1"], "go with --data"),
        (["compare", "a.onnx", "b.onnx", "--random", "2"], "a.onnx: cannot read: No such file"),
        (["compare", "a.engine", "b.onnx", "--random", "2"], "a.engine: no such engine file"),
        (["calibrate", "a.onnx", "--data", "d", "-o", "no/c.json"], "no: no such folder"),
        (["calibrate", "a.onnx", "--data", "d", "-o", "c.json"], "a.onnx"),
        (["quantize", "a.onnx", "c.json", "o.onnx"], "c.json: cannot read it"),
        (["sensitivity", "a.onnx", "c.json", "--data", "d"], "a.onnx"),
        (["inspect", "nothing"], "nothing: no such file"),
        (["build", "a.onnx", "--backend", "other", "-o", "e"], "a.onnx: cannot read"),
        (
            ["build", "a", "--backend", "tensorrt", "-o", "e", "--memory-pool", "x=1G"],
            "--memory-pool x=1G: POOL=MIB expected",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["engine", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("engine: error: ") and error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["engine", "harness"])
def test_a_graph_that_contradicts_itself_is_one_line(surgered, tmp_path, monkeypatch, capsys, name):
    model = onnx.load(surgered)
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    (weights,) = (t for t in model.graph.initializer if t.name == conv.input[1])
    one_channel = onnx.numpy_helper.to_array(weights)[:, :1]
    weights.CopyFrom(onnx.numpy_helper.from_array(one_channel, weights.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", "wrong.onnx", "--data", "d", "-o", "c.json"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as exit_:
        {"engine": main, "harness": lambda: run_harness(app)}[name]()
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert (
        error.startswith(f"{name}: error: wrong.onnx: shape inference fails")
        and error.count("\n") == 1
    )


def test_the_files_of_a_refusal_are_named(surgered, exported, tmp_path):
    for name, path in (("before.onnx", exported), ("model.onnx", surgered)):
        (tmp_path / name).symlink_to(path)
    int8 = write_int8(surgered, tmp_path / "int8.onnx", "fp32")
    cache = tmp_path / "cache.json"
    calibration = Calibration(
        {"a": 1.0}, "minmax", 1, "", "", preprocessing_sha256((3, 400, 400)), {}, 0, {}, {}
    )
    calibration.save(cache)
    images = ("--data", tmp_path, "-o", tmp_path / "c.json")
    for arguments, message in (
        (("calibrate", tmp_path / "before.onnx", *images), "before.onnx: the graph has no NMS_OPT"),
        (("calibrate", int8, *images), "int8.onnx: the graph is quantised already"),
        (
            ("quantize", tmp_path / "model.onnx", cache, tmp_path / "out.onnx"),
            f"model.onnx with {cache}: the calibration belongs to another model",
        ),
    ):
        done = attempt("-m", "engine", *arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom engine.cli import app\n"
        f"for words in {[[], *([name] for name in COMMANDS)]}:\n"
        "    app([*words, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'polygraphy', 'pycocotools', 'cv2'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or None)\n"
    )
    done = attempt("-c", code)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"{name} [OPTIONS]" in done.stdout

"""Versions of packages that another distribution may hold."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from typer.testing import CliRunner

import engine.bench.__main__
import engine.bench.int8
import harness.bench.__main__
import harness.bench.harness
import harness.bench.plans
from harness.artefacts import version
from harness.errors import HarnessError
from harness.triton import server as triton_server

OTHERS = {"onnxruntime-gpu": "1.30.1", "opencv-python": "5.0.1"}
MISSING = ("onnxruntime", "opencv-python-headless")


@pytest.fixture
def others(monkeypatch):
    """ONNX Runtime and OpenCV by another name than the declared one."""
    genuine = metadata.version

    def known(name):
        if name in MISSING:
            raise metadata.PackageNotFoundError(name)
        return OTHERS.get(name) or genuine(name)

    monkeypatch.setattr(metadata, "version", known)


def test_make_records_the_version_that_is_there(others):
    assert version("onnxruntime") == "1.30.1"
    assert version("opencv-python-headless") == "5.0.1"
    assert version("no-such-package") == "none"


def test_the_benches_run(others, tmp_path, monkeypatch):
    output, model = tmp_path / "figures.json", tmp_path / "model.onnx"
    row = {"model": "m", "way": "w", "mode": "AccuracyOnly", "scenario": "Offline", "batch": 1}
    measured = dict.fromkeys(
        (
            *("fp32_ms", "int8_ms", "int8_cpu_ms", "fp32_over_int8", "fp32_over_int8_cpu"),
            *("calibration_ms", "calibration_over_fp32"),
        ),
        1.0,
    )
    monkeypatch.setattr(engine.bench.int8, "measure", lambda *_: measured)
    monkeypatch.setattr(
        harness.bench.plans, "_measure", lambda *_: [{**row, "value": 0.5, "right": True}]
    )
    monkeypatch.setattr(
        harness.bench.harness, "load_engine", lambda *_, **__: type("E", (), {"manifest": {}})
    )
    for name in ("efficiency", "null_server", "overhead", "preprocessing"):
        monkeypatch.setattr(harness.bench.harness, f"measure_{name}", lambda *_: {})
    monkeypatch.setattr("sys.exit", lambda _: None)
    write = ["-o", str(output)]
    for app, arguments in (
        (engine.bench.__main__.app, ["int8", str(model), "--data", str(tmp_path)]),
        (harness.bench.__main__.app, ["harness", str(model)]),
        (harness.bench.__main__.app, ["plans", str(model), "--plugin", str(model)]),
    ):
        done = CliRunner().invoke(app, [*arguments, *write], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert json.loads(output.read_text())["versions"]["onnxruntime"] == "1.30.1"
        output.unlink()


def test_triton_gets_the_same_onnx_runtime(others, tmp_path, monkeypatch):
    commands = []

    def run(*command):
        commands.append(command)
        if "--no-deps" in command:
            raise HarnessError("that will do")

    monkeypatch.setattr(triton_server, "_run", run)
    with pytest.raises(HarnessError, match="that will do"):
        triton_server.install(tmp_path / "venv")
    assert any("onnxruntime==1.30.1" in command for command in commands)


def test_no_onnx_runtime_is_one_line(tmp_path, monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", none)
    with pytest.raises(HarnessError, match="ONNX Runtime is not installed"):
        triton_server.install(tmp_path / "other")

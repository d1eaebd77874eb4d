"""Choosing the fastest way to run a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from engine import auto
from engine.auto import choose
from engine.errors import EngineError
from engine.manifest import save_engine
from engine.model import load_detector
from tests.engine.comparison.test_files import manifest_of

SPEEDS = {"fast": 300.0, "slow": 200.0, "model": 100.0}


class Stopwatch:
    """Stands in for loading and measuring; keeps what was loaded."""

    def __init__(self, monkeypatch, refuses=()):
        self.loaded, self.refuses = [], refuses
        monkeypatch.setattr(auto, "_measure", self.measure)

    def measure(self, way, batch, threads):  # noqa: ARG002
        self.loaded.append((way.backend, way.device, batch))
        stem = way.file.rpartition("/")[2].partition(".")[0]
        if way.backend in self.refuses:
            return auto.Measured(way, None, "not here")
        return auto.Measured(way, SPEEDS[stem] - (way.device == "cpu"))


def plan(folder, name, content):
    data = name.encode()
    manifest = replace(
        manifest_of(content),
        engine_sha256=hashlib.sha256(data).hexdigest(),
        engine_bytes=len(data),
    )
    folder.mkdir(exist_ok=True)
    save_engine(folder / f"{name}.engine", data, manifest)


@pytest.fixture
def detector(surgered, tmp_path):
    (tmp_path / "model.onnx").write_bytes(surgered.read_bytes())
    return load_detector(tmp_path / "model.onnx")


def test_the_fastest_is_taken_and_remembered(detector, surgered, tmp_path, monkeypatch):
    folder = tmp_path / "engines"
    plan(folder, "fast", surgered.read_bytes())
    plan(tmp_path, "slow", surgered.read_bytes())
    plan(folder, "foreign", b"another model")
    (folder / "other.json").write_text("{}")
    watch = Stopwatch(monkeypatch)
    choice, remembered = choose(detector, 8, None, folder)
    assert not remembered
    assert choice.fastest.file == str(folder / "fast.engine")
    assert choice.fastest.backend == "tensorrt"
    assert watch.loaded == [  # not cudnn, which takes INT8
        ("onnxruntime", "cpu", 8),
        ("onnxruntime", "cuda:0", 8),
        ("tensorrt", "cuda:0", 8),
        ("tensorrt", "cuda:0", 8),
    ]
    again, remembered = choose(detector, 8, None, folder)
    assert remembered and again == choice and len(watch.loaded) == 4
    assert not choose(detector, 16, None, folder)[1]
    assert choose(detector, 8, None, folder)[1]
    plan(folder, "slow", surgered.read_bytes())  # one more: measured anew
    assert not choose(detector, 8, None, folder)[1]
    assert len(json.loads((folder / "auto.json").read_text())["choices"]) == 2


def test_what_cannot_run_is_last_and_nothing_at_all_is_an_error(detector, tmp_path, monkeypatch):
    folder = tmp_path / "engines"
    plan(folder, "fast", detector.path.read_bytes())
    watch = Stopwatch(monkeypatch, {"tensorrt"})
    choice, _ = choose(detector, 8, None, folder)
    assert choice.fastest.backend == "onnxruntime"
    assert choice.measured[-1].refusal == "not here"
    watch.refuses = ()  # what could not run is tried again
    choice, remembered = choose(detector, 8, None, folder)
    assert not remembered and choice.fastest.backend == "tensorrt"
    Stopwatch(monkeypatch, {"onnxruntime"})
    choice, _ = choose(detector, 4, "cpu", folder)
    with pytest.raises(EngineError, match=r"nothing here runs the file: onnxruntime .*: not here"):
        _ = choice.fastest


@pytest.mark.slow
def test_a_real_measurement(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "_SECONDS", 0.1)
    choice, _ = choose(detector, 2, "cpu", tmp_path / "engines")
    assert choice.fastest.backend == "onnxruntime"
    assert choice.measured[0].images_per_s > 0
    choice, _ = choose(detector, 2, "cuda:9", tmp_path / "engines")
    assert [one.images_per_s for one in choice.measured] == [None]

"""An engine is loaded for the largest batch that what is to be run can need, and for no larger."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import EngineError
from harness.cli.main import main
from harness.loadgen.settings import Offline, largest_batch, settings_from
from harness.make import targets
from harness.make.arguments import run_args
from harness.make.system_config import SystemConfig
from harness.results import devices
from tests.support.compliance_runs import CheatingEngine, base_runs, benchmark


@pytest.fixture
def harness(monkeypatch, capsys):
    """The command, whose engines tell only for which batch they were to be loaded."""

    def load(_backend, _model, *, max_batch, **_):
        raise EngineError(f"up to {max_batch}")

    monkeypatch.setattr(devices, "load_engine", load)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, words)])
        with pytest.raises(SystemExit, match=r"^2$"):
            main()
        return capsys.readouterr().err.strip().removeprefix("harness: error: ")

    return run


@pytest.mark.parametrize(
    ("words", "largest"),
    [
        ("--scenarios SingleStream", 1),
        ("--scenarios MultiStream", 8),
        ("--scenarios SingleStream,MultiStream", 8),
        ("--scenarios Offline,Server --batch 48", 48),
        ("--scenarios Offline,MultiStream --batch 2", 8),
        ("--scenarios Server", 8),  # LoadGen's tests take 8 where nothing else is said
    ],
)
def test_run(harness, words, largest):
    assert harness("run", "m.onnx", "--engine", "cudnn", *words.split()) == f"up to {largest}"


def test_a_settings_file(harness, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text("[MultiStream]\nsamples_per_query = 12\n[Server]\nbatch_size = 24\n")
    run = ("run", "m.onnx", "--engine", "cudnn", "--config", settings, "--scenarios")
    assert harness(*run, "MultiStream") == "up to 12"
    assert harness(*run, "MultiStream,Server") == "up to 24"


def test_a_batch_that_is_not_chosen_yet():
    assert largest_batch([Offline(batch_size=3)]) == 3
    assert largest_batch([Offline()]) == 8


@pytest.mark.parametrize("prepared", [8, 64])
def test_compliance_loads_what_the_base_run_had(harness, tmp_path, prepared):
    """Else the engines would differ: one of 64 runs other kernels than one of 8."""
    bench = benchmark(tmp_path / "data", CheatingEngine(seconds=0.001))
    folder = base_runs(bench, tmp_path / "logs", "SingleStream", target_latency_ms=1.0)
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        result["engine"]["max_batch"] = prepared
        path.write_text(json.dumps(result))
    words = ("compliance", "TEST05", "m.onnx", "--engine", "cudnn", "--base", tmp_path / "logs")
    assert harness(*words) == f"up to {prepared}"


@pytest.mark.parametrize(
    ("engine", "loaded"),
    [
        ("cudnn", {"int8.onnx": 32}),
        ("tensorrt", {"32.engine": 32, "4.engine": 4, "1.engine": 1, "8.engine": 8}),
    ],
)
def test_make(engine, loaded, monkeypatch, tmp_path):
    """An ONNX file is loaded once for all scenarios, a plan for those that it was built for."""
    scenarios = "Offline,Server,SingleStream,MultiStream"
    tables = {"Offline": {"batch_size": 32}, "Server": {"batch_size": 4}}
    config = SystemConfig("box", engine=engine, device="cuda", tables=tables)
    found = {}

    def load(_backend, model, *, max_batch, **_):
        found[model.name] = max_batch
        return (SimpleNamespace(),)

    def plan(_route, model, _backend, batch):
        return model if batch is None else Path(f"{batch}.engine")

    monkeypatch.setattr(
        targets, "_settings", lambda *_: (config, settings_from(tables, scenarios.split(","), {}))
    )
    monkeypatch.setattr(targets, "build_int8", lambda *_: SimpleNamespace(path=Path("int8.onnx")))
    monkeypatch.setattr(targets, "build_engine", plan)
    monkeypatch.setattr(targets, "val_images", lambda *_: None)
    monkeypatch.setattr(targets, "known_dataset", lambda *_: None)
    monkeypatch.setattr(targets, "check_classes", lambda *_: None)
    monkeypatch.setattr(targets, "load_engines", load)
    arguments = run_args(
        benchmarks="ssd-resnet34-demo",
        scenarios=scenarios,
        test_mode="PerformanceOnly",
        config_ver="default",
        system=None,
        fast=False,
        devices=None,
        url=None,
        streams=None,
    )
    route = SimpleNamespace(benchmark="ssd-resnet34-demo", build_dir=tmp_path, dataset="demo")
    tests = targets._tests([route], arguments, ExitStack())
    assert len(tests) == 4
    assert found == loaded

"""What the bench of several GPUs runs and makes of it: a stand-in for `harness run`, and CPUs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from harness.bench import scaling
from harness.bench.__main__ import app
from harness.command import run_command
from harness.loadgen.settings import SCENARIOS
from tests.harness.results.test_report import result
from tests.support import attempt, command
from tests.support.fake_gpus import FakeRuntime

RATE = {"0": 100.0, "1": 110.0}
"""Offline samples/s of each GPU alone."""


def bench(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_command(app, "python -m harness.bench")
    return end.value.code


class Harness:
    """Stands in for `harness run`: two GPUs together lose a tenth."""

    def __init__(self, patch):
        self.ran = []
        patch.setattr(scaling, "run_harness", self.run)

    def run(self, commands, seconds, *_):
        found = []
        for options in commands:
            said = dict(word.lstrip("-").split("=") for word in options if "=" in word)
            scenario = options[options.index("--scenarios") + 1]
            assert scenario in SCENARIOS
            self.ran.append((scenario, said, len(commands), seconds))
            gpus = said["devices"].split(",")
            value = sum(RATE[number] for number in gpus) * (0.9 if len(gpus) > 1 else 1)
            if scenario == "Server":
                value = float(said["target-qps"])
            if scenario == "SingleStream":
                value = 2.0 if len(gpus) > 1 else 1.0
            engine = {
                "backend": "cudnn",
                "devices": [f"cuda:{number}" for number in gpus],
                "gpus": [{"index": int(number), "uuid": f"GPU-{number}"} for number in gpus],
            }
            found.append(
                replace(
                    result(scenario=scenario, engine=engine, latency_ms={"p99": 9.0, "max": 1e4}),
                    value=value,
                    valid=scenario != "Server" or len(gpus) == 1,
                )
            )
        return found


def test_ways_turns_and_ratios(monkeypatch, tmp_path, capsys):
    FakeRuntime("NVIDIA H200", "NVIDIA H200").stand_in(monkeypatch)
    harness, path = Harness(monkeypatch), tmp_path / "scaling.json"
    words = ("scaling", "model.onnx", "-o", path, "--data", tmp_path, "--batch", 8)
    assert not bench(monkeypatch, *words, "--server-qps", 90, "--seconds", 30)
    found = json.loads(path.read_text())
    (prepared, *counted) = harness.ran
    assert prepared[3] < 30
    assert {seconds for *_, seconds in counted} == {30}
    offline = [
        (said["devices"], beside) for scenario, said, beside, _ in counted if scenario == "Offline"
    ]
    first = [("0", 1), ("0,1", 1), ("0", 2), ("1", 2)]
    assert offline == [*first, ("0", 2), ("1", 2), ("0,1", 1), ("1", 1)]  # the second turn reversed
    rates = [(said["devices"], said["target-qps"]) for one, said, *_ in counted if one == "Server"]
    assert rates == [("0", "90.0"), ("0,1", "180.0"), ("0,1", "180.0"), ("1", "90.0")]
    for _, said, *_ in harness.ran:
        assert said["preprocessed"] == str(tmp_path)
        assert said["engine"] == "cudnn"
    assert all(
        (said.get("batch") == "8") == (scenario != "SingleStream")
        for scenario, said, *_ in harness.ran
    )
    one = found["Offline"]
    assert (one["one"], one["together"], one["apart"]) == ([100, 110], [189, 189], [210, 210])
    assert one["together over one"] == pytest.approx(1.8)
    assert one["apart over one"] == pytest.approx(2.0)
    assert one["share of linear"] == pytest.approx(0.9)
    assert found["Server"]["valid"] == {"one": [True, True], "together": [False, False]}
    assert found["SingleStream"]["together over one"] == 2.0
    assert "share of linear" not in found["SingleStream"]
    assert [gpu["uuid"] for gpu in found["gpus"]] == ["GPU-0", "GPU-1"]
    assert found["command"].startswith("bench scaling model.onnx")
    assert {"commit", "cpu", "cpus", "gpu", "versions", "driver", "finished"} <= found.keys()
    assert [row["devices"] for row in found["runs"] if row["way"] == "apart"] == [
        ["cuda:0", "cuda:1"]
    ] * 2
    out = capsys.readouterr().out
    assert "Server: " in out and "INVALID: together" in out.partition("Server: ")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "two GPUs at least are compared, not 1"),
        (["--devices", "0"], "two GPUs at least are compared, not 1"),
        (["--devices", "0,1", "--sessions", "2"], "give --devices or --sessions"),
    ],
)
def test_what_cannot_be_compared(words, message, monkeypatch, tmp_path, capsys):
    FakeRuntime("NVIDIA H200").stand_in(monkeypatch)
    assert bench(monkeypatch, "scaling", "model.onnx", "-o", tmp_path / "x.json", *words) == 2
    assert capsys.readouterr().err == f"harness: error: {message}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sessions_on_a_cpu(demo_surgered, demo_build, tmp_path):
    path = tmp_path / "scaling.json"
    words = ["scaling", demo_surgered, "-o", path, "--engine=onnxruntime", "--sessions=2"]
    words += ["--batch=2", "--seconds=0.5", "--rounds=1", f"--build-dir={demo_build}"]
    command("harness.bench", *words)
    found = json.loads(path.read_text())
    assert found["of"] == 2
    assert found["engine"]["backend"] == "onnxruntime"
    assert set(found["Offline"]) > {"one", "together", "apart", "share of linear"}
    assert "Server" not in found
    (apart,) = [row for row in found["runs"] if row["way"] == "apart"]
    assert apart["value"] == pytest.approx(sum(apart["values"]))
    assert len(apart["finished"]) == 2


@pytest.mark.slow
def test_a_run_that_fails_is_one_line(tmp_path):
    words = ["-m", "harness.bench", "scaling", tmp_path / "none.onnx", "-o", tmp_path / "x.json"]
    done = attempt(*words, "--engine=onnxruntime", "--sessions=2")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "harness run ended with exit code 2: harness: error: " in done.stderr
    assert "none.onnx" in done.stderr

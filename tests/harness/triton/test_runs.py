"""LoadGen runs through Triton servers for real: equal logs, servers that die, the command."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from engine.backends.triton import engine as triton
from engine.errors import SessionLostError
from engine.load import load_engine
from harness.loadgen.log import ACCURACY
from harness.loadgen.settings import SCENARIOS, load_settings
from harness.results.run import Benchmark, run
from tests.support.triton_servers import IMAGES, ROOT, First

pytest_plugins = ("tests.support.triton_servers",)


def accuracy_log(engines, images, scenario, directory, **more):
    """Response of each sample, and the run's result."""
    targets = {"target_qps": 40.0} if scenario == "Server" else {}
    options = {"performance_sample_count": 16, **targets}
    (settings,) = load_settings([scenario], None, options)
    result = run(Benchmark(engines, images, None, 60), settings, "AccuracyOnly", directory, **more)
    log = json.loads((directory / ACCURACY).read_text())
    assert len(log) == IMAGES
    return {entry["qsl_idx"]: entry["data"] for entry in log}, result


@pytest.fixture(scope="module")
def reference_log(direct, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("direct") / "run"
    log, _ = accuracy_log((direct,), images, "Offline", folder)
    assert sum(map(bool, log.values())) > IMAGES / 2  # images with detections
    return log


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_accuracy_is_the_same_to_the_last_digit(  # noqa: PLR0917
    scenario, server, exported, images, reference_log, tmp_path
):
    engine = load_engine("triton", exported, device=server.url)
    log, result = accuracy_log((engine,), images, scenario, tmp_path / "run")
    assert log == reference_log
    assert result.engine["devices"] == [server.url]


def test_a_server_that_dies(  # noqa: PLR0917
    start, server, exported, preprocessed, reference_log, tmp_path
):
    """Its batches in flight go to the other server, and every answer is right."""
    dies = start()

    def kill():
        os.killpg(dies.process.pid, signal.SIGSTOP)  # what is sent from now on is in flight
        threading.Timer(0.5, os.killpg, (dies.process.pid, signal.SIGKILL)).start()

    engines = tuple(load_engine("triton", exported, device=one.url) for one in (dies, server))
    source = First(preprocessed, engines[0].input_spec, kill)
    log, result = accuracy_log(engines, source, "Offline", tmp_path / "run")
    assert log == reference_log
    assert result.engine["devices"] == [dies.url, server.url]
    (lost,) = [warning for warning in result.warnings if "lost" in warning]
    assert f"the Triton server {dies.url}: " in lost


def test_a_server_that_falls_silent(  # noqa: PLR0917
    start, server, exported, preprocessed, reference_log, tmp_path, monkeypatch
):
    """As when its host loses power: no connection is ever closed."""
    monkeypatch.setattr(triton, "_SIGN_OF_LIFE_SECONDS", 0.5)
    stops = start()
    engines = tuple(load_engine("triton", exported, device=one.url) for one in (stops, server))
    stop = functools.partial(os.killpg, stops.process.pid, signal.SIGSTOP)
    source = First(preprocessed, engines[0].input_spec, stop)
    try:
        log, result = accuracy_log(engines, source, "Offline", tmp_path / "run")
    finally:
        os.killpg(stops.process.pid, signal.SIGCONT)
    assert log == reference_log
    assert any(f"the Triton server {stops.url}: " in warning for warning in result.warnings)


def test_a_session_whose_server_is_gone(start, exported, batch):
    server = start()
    session = load_engine("triton", exported, device=server.url).session()
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with pytest.raises(SessionLostError, match=f"the Triton server {server.url}: "):
        session.infer(batch)
    session.close()


def harness_run(model, url, preprocessed, directory, *arguments):
    command = [
        *(sys.executable, "-m", "harness", "run", str(model), "--engine", "triton", "--url", url),
        *("--dataset", "demo", "--preprocessed", str(preprocessed)),
        *("--log-dir", str(directory), *arguments),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_all_scenarios_through_the_command(server, exported, preprocessed, tmp_path):
    arguments = ("--scenarios", ",".join(SCENARIOS), "--min-duration", "0.3", "--target-qps", "30")
    run = harness_run(
        exported, server.url, preprocessed, tmp_path, *arguments, "--min-queries", "3"
    )
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr
    results = {
        path.parts[-3]: json.loads(path.read_text()) for path in tmp_path.rglob("result.json")
    }
    assert set(results) == set(SCENARIOS)
    for result in results.values():
        assert result["engine"]["backend"] == "triton"
        assert result["engine"]["served_by"] == "python"
        assert result["value"] > 0


def test_the_last_server_dies(start, exported, preprocessed, tmp_path):
    server = start("--model-config-name=Server")
    engine = load_engine("triton", exported, device=server.url)
    assert engine.manifest["queue_delay_us"] == 1000  # the scenario's configuration
    arguments = ("--scenarios", "Server", "--min-duration", "60", "--target-qps", "20")
    run = harness_run(exported, server.url, preprocessed, tmp_path, *arguments)
    detail = "mlperf_log_detail.txt"
    for _ in range(200):
        if list(tmp_path.rglob(detail)):
            break
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(server.process.pid, signal.SIGKILL)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == 1
    (error,) = [line for line in stderr.splitlines() if "error" in line]
    assert error.startswith(
        f"harness: error: Server PerformanceOnly: the Triton server {server.url}: "
    )
    assert not list(tmp_path.rglob("result.json"))

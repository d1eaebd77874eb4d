"""Triton servers for real, on this machine, against ONNX Runtime without one."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from triton_servers import ROOT, server_command

from engine.backends import triton, triton_memory
from engine.load import load_engine
from engine.preprocessed import load_preprocessed
from engine.protocol import EngineError, SessionLostError
from harness.dataset import known_dataset
from harness.devices import load_engines
from harness.errors import HarnessError
from harness.loadgen_log import ACCURACY
from harness.preprocess import preprocess
from harness.run import Benchmark, run
from harness.settings import SCENARIOS, load_settings
from harness.triton_repository import Repository, write_repository
from harness.triton_server import running_server

MAX_BATCH = 8
IMAGES = 40


@pytest.fixture(scope="module")
def repository(exported, tmp_path_factory) -> Repository:
    return write_repository(
        exported, tmp_path_factory.mktemp("triton") / "models", "python", max_batch=MAX_BATCH
    )


@pytest.fixture
def start(repository, tmp_path):
    """Start servers that end with the test."""
    command = server_command()
    with ExitStack() as stack:

        def one(*arguments):
            log = tmp_path / f"{len(list(tmp_path.glob('*.log')))}.log"
            return stack.enter_context(running_server(command, repository, log, arguments))

        yield one


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(server_command(), repository, log) as running:
        yield running


@pytest.fixture(scope="module")
def direct(exported):
    return load_engine("onnxruntime", exported)


@pytest.fixture(scope="module")
def preprocessed(direct, tmp_path_factory) -> Path:
    """Folder of the demo's images."""
    folder = tmp_path_factory.mktemp("images")
    preprocess(
        known_dataset("demo", "val", folder),
        direct.input_spec,
        folder / "out",
        workers=2,
        overwrite=False,
        skip_bad=False,
        progress=False,
    )
    return folder / "out"


class First:
    """The first of the demo's images, as a source of samples.

    Does something when LoadGen loads samples for the second time, in the middle of a run.
    """

    def __init__(self, preprocessed, spec, then=lambda: None):
        self._all = load_preprocessed(preprocessed, spec)
        self.files = self._all.files[:IMAGES]
        self._then = then
        self._loads = 0

    def read_into(self, batch, indices):
        self._all.read_into(batch, indices)
        self._loads += 1
        if self._loads == 3:  # the first time is the warm-up's
            self._then()


@pytest.fixture(scope="module")
def images(preprocessed, direct):
    return First(preprocessed, direct.input_spec)


@pytest.fixture
def batch(images):
    array = np.empty((6, 3, 400, 400), np.float32)
    images.read_into(array, range(6))
    return array


def shared(engine, array):
    """The array in the engine's memory."""
    memory = engine.host_array(array.shape, array.dtype)
    memory[:] = array
    return memory


def regions(engine):
    return set(engine._client.get_system_shared_memory_status().regions)


def check(session, direct_session, runs):
    session.submit(runs)
    detections, counts = session.result()
    expected, expected_counts = direct_session.infer(np.concatenate(runs))
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(detections, expected)
    assert counts.sum() > 0


def test_batches_as_the_model_without_a_server(server, direct, exported, batch):
    engine = load_engine("triton", exported, device=server.url)
    assert engine.input_spec == direct.input_spec
    assert engine.max_batch == MAX_BATCH
    assert engine.manifest["onnx_sha256"] == direct.manifest["onnx_sha256"]
    assert engine.manifest["images_through"] == "system shared memory"
    before = regions(engine)
    memory = shared(engine, batch)
    session, reference = engine.session(), direct.session()
    check(session, reference, [memory[1:5]])
    assert len(regions(engine)) == len(before) + 1  # the images were where they had to be
    check(session, reference, [memory[5:], memory[:2], memory[3:4]])
    check(session, reference, [batch])
    session.close()
    del memory, session
    engine.session().close()
    assert regions(engine) == before
    assert not list(Path("/dev/shm").glob("ssd-resnet34-*"))  # noqa: S108


def test_images_are_sent_where_no_memory_is_shared(server, direct, exported, batch, monkeypatch):
    """As from another host: the server cannot open what the client names."""
    monkeypatch.setattr(triton_memory.SystemMemory, "negotiate", lambda _: None)
    engine = load_engine("triton", exported, device=server.url)
    assert engine.manifest["images_through"] == "gRPC"
    session = engine.session()
    check(session, direct.session(), [batch[:2], batch[4:]])
    session.close()


def test_a_server_that_cannot_open_the_memory(server, exported, monkeypatch):
    """Negotiation for real: a name that is not there, as on another host."""
    monkeypatch.setattr(triton_memory, "_FOLDER", Path("/tmp"))  # noqa: S108
    engine = load_engine("triton", exported, device=server.url)
    assert engine.manifest["images_through"] == "gRPC"


def test_too_little_shared_memory(  # noqa: PLR0917
    server, direct, exported, batch, monkeypatch, caplog
):
    engine = load_engine("triton", exported, device=server.url)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    memory = shared(engine, batch)
    session = engine.session()
    for _ in range(session.depth):  # each request's place asks once
        check(session, direct.session(), [memory])
    asked = caplog.text.count("No space left on device")
    check(session, direct.session(), [memory])  # is not asked for again
    session.close()
    assert 0 < asked == caplog.text.count("No space left on device")
    assert not list(Path("/dev/shm").glob("ssd-resnet34-*"))  # noqa: S108


def test_results_come_in_the_order_of_the_batches(server, direct, exported, batch):
    engine = load_engine("triton", exported, device=server.url)
    session = engine.session()
    assert session.depth >= 2
    memory = shared(engine, batch)
    reference = [direct.session().infer(batch[i : i + 1])[0] for i in range(len(batch))]
    waiting = []
    for i in [*range(len(batch))] * 2:
        if len(waiting) == session.depth:
            np.testing.assert_array_equal(session.result()[0], reference[waiting.pop(0)])
        session.submit([memory[i : i + 1]])
        waiting.append(i)
    with pytest.raises(EngineError, match="in flight"):
        for _ in range(session.depth):
            session.submit([memory[:1]])
    while waiting:
        np.testing.assert_array_equal(session.result()[0], reference[waiting.pop(0)])
    session.close()


def test_requests_that_the_server_joins(server, direct, exported, batch):
    """Several sessions at once: Triton puts their images into one batch."""
    engine = load_engine("triton", exported, device=server.url)
    sessions = [engine.session() for _ in range(len(batch))]

    def statistics():
        (model,) = engine._client.get_inference_statistics(triton.MODEL_NAME).model_stats
        return np.array([model.inference_count, model.execution_count])

    before = statistics()
    for _ in range(2):  # the first ones occupy the model, the others wait together
        for i, session in enumerate(sessions):
            session.submit([batch[i : i + 1]])
    reference = [direct.session().infer(batch[i : i + 1]) for i in range(len(batch))]
    for _ in range(2):
        for session, (detections, counts) in zip(sessions, reference, strict=True):
            found, found_counts = session.result()
            np.testing.assert_array_equal(found_counts, counts)
            np.testing.assert_array_equal(found[..., [0, 6]], detections[..., [0, 6]])
            np.testing.assert_allclose(found, detections, atol=1e-6)
    for session in sessions:
        session.close()
    images, executions = statistics() - before
    assert images == 2 * len(batch)
    assert executions < images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 400, 400), np.int8), "images are int8, the model takes float32"),
        (np.zeros((MAX_BATCH + 1, 3, 400, 400), np.float32), "a batch of 9 images"),
    ],
)
def test_a_wrong_batch(server, exported, images, message):
    session = load_engine("triton", exported, device=server.url).session()
    with pytest.raises(EngineError, match=message):
        session.submit([images])
    with pytest.raises(EngineError, match="no batch"):
        session.result()
    session.close()


def test_another_model_is_refused(server, small_model, exported, tmp_path):
    import onnx

    other = onnx.load(exported)
    other.doc_string = "not the same file"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(EngineError, match=r"serves another ssd-resnet34: its onnx_sha256 is "):
        load_engine("triton", tmp_path / "other.onnx", device=server.url)


def test_a_model_that_is_not_there_is_refused(server, exported, monkeypatch):
    monkeypatch.setattr(triton, "MODEL_NAME", "resnet50")
    with pytest.raises(EngineError, match=r"no model resnet50 \(it has: ssd-resnet34\)"):
        load_engine("triton", exported, device=server.url)


def test_a_server_that_is_not_there(exported, monkeypatch, capsys):
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    monkeypatch.setattr(triton, "START_UP_SECONDS", 0.6)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 does not answer"):
        load_engine("triton", exported, device="127.0.0.1:9")
    assert time.monotonic() - begin >= 0.6
    assert "waiting for the Triton server 127.0.0.1:9" in capsys.readouterr().err


def test_a_device_is_no_server(exported):
    with pytest.raises(EngineError, match="HOST:PORT of a server, not on 'cuda'"):
        load_engine("triton", exported)


def test_a_model_that_does_not_load(repository, tmp_path):
    """The server says so and ends; its log tells why."""
    import shutil

    broken = tmp_path / "models"
    shutil.copytree(repository.path, broken)
    (model,) = broken.rglob("*.onnx")
    model.write_bytes(b"no model")
    bad = Repository(broken, (f"--model-repository={broken}",))
    with (
        pytest.raises(HarnessError, match="tritonserver ended with exit code"),
        running_server(server_command(), bad, tmp_path / "log"),
    ):
        pass
    assert "ONNX Runtime cannot load it" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("change", ["input", "dtype", "outputs", "batch", "silent"])
def test_a_configuration_that_differs_is_refused(change, exported, repository):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    from engine.served import served_model

    text = (repository.path / triton.MODEL_NAME / "config.pbtxt").read_text()
    config = text_format.Parse(text, pb.ModelConfig())
    served = served_model(exported)
    triton.check_config(config, served, "host:1")
    match change:
        case "input":
            config.input[0].dims[1] = 300
        case "dtype":
            config.input[0].data_type = pb.TYPE_INT8
        case "outputs":
            del config.output[0]
        case "batch":
            config.max_batch_size = 0
        case "silent":
            del config.parameters["onnx_sha256"]
    said = {"outputs": "detections", "batch": "max_batch_size", "silent": "not told"}
    with pytest.raises(EngineError, match=f"host:1.*{said.get(change, 'its input is')}"):
        triton.check_config(config, served, "host:1")


@pytest.mark.parametrize("url", ["host", "host:", ":8001", "host:99999", "a:1,a:1", "a:1,,b:2"])
def test_no_list_of_servers(url):
    from harness.devices import parse_urls

    with pytest.raises(HarnessError, match="--url"):
        parse_urls(url)


@pytest.mark.parametrize(
    ("backend", "more", "message"),
    [
        ("triton", {}, "--url"),
        ("triton", {"urls": ["a:1"], "device": "cuda"}, "the servers' affair"),
        ("onnxruntime", {"urls": ["a:1"]}, "--url"),
    ],
)
def test_options_that_do_not_go_together(backend, more, message, exported):
    options = {"device": None, "devices": None, "threads": None, **more}
    with pytest.raises(HarnessError, match=message):
        load_engines(backend, exported, **options)


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

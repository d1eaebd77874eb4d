"""Triton servers for real, on this machine, against ONNX Runtime without one."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from engine.backends.triton import engine as triton
from engine.backends.triton import memory as triton_memory
from engine.errors import EngineError
from engine.load import load_engine
from harness.errors import HarnessError
from harness.results.devices import load_engines
from harness.triton.repository import Repository
from harness.triton.server import running_server
from tests.support.triton_servers import MAX_BATCH, server_command

pytest_plugins = ("tests.support.triton_servers",)


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
    for name in ("onnx_sha256", "input", "keep_top_k", "outputs"):
        assert engine.manifest[name] == direct.manifest[name]
    assert engine.manifest["images_through"] == "system shared memory"
    before = regions(engine)
    memory = shared(engine, batch)
    session, reference = engine.session(), direct.session()
    held = regions(engine)
    _, offset = session._places[0].put([memory[1:5]])
    assert offset == memory[0].nbytes  # the images are where they have to be
    check(session, reference, [memory[1:5]])
    assert regions(engine) == held
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


def test_requests_that_the_server_joins(start, direct, exported, batch):
    """Several sessions at once: Triton puts their images into one batch."""
    server = start("--model-config-name=Offline")  # in which requests wait for others
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
    assert "not an ONNX model" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("change", ["input", "dtype", "outputs", "batch", "instances", "silent"])
def test_a_configuration_that_differs_is_refused(change, exported, repository):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    from engine.backends.triton.served import served_model

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
        case "instances":
            del config.instance_group[:]
        case "silent":
            del config.parameters["onnx_sha256"]
    said = {"outputs": "detections", "batch": "max_batch_size", "silent": "not told"}
    said["instances"] = "no instance_group"
    with pytest.raises(EngineError, match=f"host:1.*{said.get(change, 'its input is')}"):
        triton.check_config(config, served, "host:1")


@pytest.mark.parametrize("url", ["host", "host:", ":8001", "host:99999", "a:1,a:1", "a:1,,b:2"])
def test_no_list_of_servers(url):
    from harness.results.devices import parse_urls

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

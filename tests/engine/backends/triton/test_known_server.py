"""Servers that answer wrongly, for real: Triton with models that are spoilt."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest

from engine.backends.triton.config import KNOWN_PARAMETER
from engine.errors import EngineError
from engine.load import load_engine
from harness.errors import RunFailedError
from harness.loadgen.settings import load_settings
from harness.results.run import Benchmark, run
from harness.triton.server import running_server
from tests.support.triton_servers import server_command

pytest_plugins = ("tests.support.triton_servers",)

STALE = """
import numpy as np
import triton_python_backend_utils as triton
from engine.backends.triton.python_model import TritonPythonModel as Right

class TritonPythonModel(Right):
    '''Answers with what it found {when}, as a CUDA graph does that is replayed too early.'''

    calls = 0

    def initialize(self, args):
        super().initialize(args)
        self.last = {{}}

    def execute(self, requests):
        return [self.spoilt(one) for one in super().execute(requests)]

    def spoilt(self, found):
        self.calls += 1
        found = [(one.name(), one.as_numpy().copy()) for one in found.output_tensors()]
        size = len(found[0][1])
        before = self.last.get(size, found)
        self.last[size] = found
        return triton.InferenceResponse([triton.Tensor(*one) for one in {answer}])
"""


@pytest.fixture
def serve(repository, tmp_path):
    """Start a server for a copy of the repository after a change."""
    command = server_command()
    running = []

    def start(change):
        copy = shutil.copytree(repository.path, tmp_path / "models")
        change(copy / "ssd-resnet34")
        arguments = tuple(
            word.replace(str(repository.path), str(copy)) for word in repository.server_arguments
        )
        context = running_server(
            command, replace(repository, path=copy, server_arguments=arguments), tmp_path / "log"
        )
        running.append(context)
        return context.__enter__()

    yield start
    for context in running:
        context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("when", "answer"),
    [
        ("before", "before"),
        ("before, at every fifth request", "(before if self.calls % 5 == 0 else found)"),
    ],
)
def test_a_server_with_stale_answers(serve, exported, monkeypatch, when, answer):
    monkeypatch.setattr("engine.backends.triton.known._LOAD_SECONDS", 2.0)
    code = STALE.format(when=when, answer=answer)
    server = serve(lambda model: (model / "1" / "model.py").write_text(code))
    engine = load_engine("triton", exported, device=server.url)
    with pytest.raises(
        EngineError, match=re.escape(server.url) + " gives wrong answers: .*known picture"
    ):
        engine.session()


def test_a_run_on_it_ends_before_loadgen_starts(serve, exported, images, tmp_path):
    code = STALE.format(when="before", answer="before")
    server = serve(lambda model: (model / "1" / "model.py").write_text(code))
    engine = load_engine("triton", exported, device=server.url)
    (settings,) = load_settings(["Offline"], None, {})
    with pytest.raises(RunFailedError, match=r"Offline AccuracyOnly: .* gives wrong answers"):
        run(Benchmark((engine,), images, None, 60), settings, "AccuracyOnly", tmp_path / "run")
    assert not list(tmp_path.rglob("mlperf_log_*"))


def edit(model, change):
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    path = model / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    change(config)
    path.write_text(text_format.MessageToString(config))


def both(config):
    config.optimization.cuda.graphs = True
    config.optimization.cuda.output_copy_stream = True


def test_a_configuration_that_makes_answers_wrong(serve, exported):
    """As in the repositories that were written before."""
    server = serve(lambda model: edit(model, both))
    with pytest.raises(EngineError, match=r"take output_copy_stream out of its config\.pbtxt"):
        load_engine("triton", exported, device=server.url)


def test_a_repository_without_known_answers(serve, exported):
    server = serve(lambda model: edit(model, lambda config: config.parameters.pop(KNOWN_PARAMETER)))
    with pytest.raises(EngineError, match=r"no known answers .* anew with 'harness triton-repos"):
        load_engine("triton", exported, device=server.url)

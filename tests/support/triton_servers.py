"""A pytest plugin: Triton servers, the one that `make triton_server` installs, and their input."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.data.preprocessed import load_preprocessed
from engine.load import load_engine
from harness.data.dataset import known_dataset
from harness.data.preprocess import preprocess
from harness.errors import HarnessError
from harness.triton.repository import Repository, write_repository
from harness.triton.server import find_server, running_server
from tests.support import ROOT

MAX_BATCH = 8
IMAGES = 40


def server_command() -> Path:
    """`tritonserver`, or the test is skipped."""
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    try:
        return find_server(ROOT / os.environ.get("BUILD_DIR", "build"))
    except HarnessError:
        pytest.skip("needs a Triton server: make triton_server")


@pytest.fixture(autouse=True)
def short_check(request, monkeypatch):
    """These servers are slow: what comes before the load shows nearly all that tests spoil."""
    if {"server", "start", "serve"} & set(request.fixturenames):
        monkeypatch.setattr("engine.backends.triton.known._LOAD_SECONDS", 0.0)


@pytest.fixture(scope="session")
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
            all_of_them = (*repository.server_arguments, *arguments)
            served = replace(repository, server_arguments=all_of_them)
            return stack.enter_context(running_server(command, served, log))

        yield one


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(server_command(), repository, log) as running:
        yield running


@pytest.fixture(scope="session")
def direct(exported):
    return load_engine("onnxruntime", exported)


@pytest.fixture(scope="session")
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
        say=print,
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


@pytest.fixture(scope="session")
def images(preprocessed, direct):
    return First(preprocessed, direct.input_spec)


@pytest.fixture
def batch(images):
    array = np.empty((6, 3, 400, 400), np.float32)
    images.read_into(array, range(6))
    return array

"""Two GPUs of one host under LoadGen, for real; the demo detector on cuDNN."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from engine.backends.cuda import describe_gpu, visible_gpus
from engine.errors import EngineError
from harness.loadgen.log import ACCURACY
from harness.results.report import find_results
from plugin_cuda.library import library_path
from tests.support import ROOT, command
from tests.support.cudnn_gpu import cudnn_missing


def missing():
    """What keeps these tests from running here."""
    if reason := cudnn_missing():
        return reason
    try:
        gpus = [describe_gpu(number) for number in visible_gpus()]
    except EngineError as error:
        return str(error)
    same = len(gpus) > 1 and gpus[0].name == gpus[1].name
    return None if same else "needs two GPUs of one model"


reason = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=reason or "")]

MODES = ["--scenarios", "Offline", "--test_mode", "AccuracyOnly", "--batch", "8"]


@pytest.fixture(scope="module")
def place(demo_int8, demo_build, tmp_path_factory):
    """Start of a command for the demo's INT8 images, and a build folder for its caches."""
    command(
        *("harness", "preprocess", demo_int8, "--dataset", "demo", "--val_only"),
        *("--build-dir", demo_build),
    )
    model = ["harness", "run", demo_int8, "--engine", "cudnn", "--dataset", "demo"]
    return [*model, "--build-dir", demo_build], build_folder(tmp_path_factory.mktemp("tuning"))


def build_folder(folder):
    """A build folder that has the libraries, and nothing tuned."""
    (folder / "plugins").symlink_to(library_path().resolve().parent)
    return folder


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Log folder and result of accuracy runs, by what --devices says."""
    words, build = place
    found = {}
    for devices in ("0", "1", "0,1"):
        logs = tmp_path_factory.mktemp("logs") / "run"
        command(*words, *MODES, "--devices", devices, "--log-dir", logs, BUILD_DIR=str(build))
        ((found[devices], result),) = find_results([logs])
        found[f"result of {devices}"] = result
    return found


@pytest.mark.parametrize("devices", ["1", "0,1"])
def test_two_gpus_find_what_one_finds(devices, runs):
    """Byte by byte: the batches are of 8 everywhere, and so the kernels are the same."""
    one, other = (
        {
            entry["qsl_idx"]: entry["data"]
            for entry in json.loads((runs[name] / ACCURACY).read_text())
        }
        for name in ("0", devices)
    )
    assert len(one) == 120
    assert other.keys() == one.keys()
    assert [index for index in one if one[index] != other[index]] == []
    assert runs[f"result of {devices}"].value == runs["result of 0"].value


def test_the_result_names_both(runs):
    engine = runs["result of 0,1"].engine
    assert engine["devices"] == ["cuda:0", "cuda:1"]
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,uuid", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    named = {f"{gpu['name']}, {gpu['uuid']}" for gpu in engine["gpus"]}
    assert len(named) == 2
    assert named <= set(listed)
    assert [gpu["index"] for gpu in engine["gpus"]] == [0, 1]
    assert [gpu["manifest"] for gpu in engine["gpus"]] == [{}, {}]


def test_both_work(place, tmp_path):
    """A performance run on all GPUs: no session is lost, and each one is there."""
    words, build = place
    more = ["--scenarios", "Offline", "--min-duration", "2", "--min-queries", "1"]
    command(*words, *more, "--devices", "all", "--log-dir", tmp_path, BUILD_DIR=str(build))
    ((_, result),) = find_results([tmp_path])
    assert len(result.engine["devices"]) == len(visible_gpus())
    assert (result.lost_devices, result.warnings) == ((), ())
    assert result.samples_per_second > 0


def test_two_processes_that_tune_at_once_search_once(place, tmp_path):
    words, _ = place
    arguments = [sys.executable, "-m", *words, "--scenarios", "SingleStream"]
    arguments += ["--min-duration", "1", "--min-queries", "1"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    folder = build_folder(tmp_path)
    environment = {**os.environ, "BUILD_DIR": str(folder), "PYTHONPATH": path}
    both = [
        subprocess.Popen(
            [*map(str, arguments), "--devices", number, "--log-dir", str(tmp_path / number)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for number in ("0", "1")
    ]
    said = [one.communicate()[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted("looking for the fastest kernels" in text for text in said) == [False, True]
    (cache,) = (tmp_path / "engines" / "cudnn").glob("*.json")
    assert json.loads(cache.read_text())["plans"]
    kernels = [find_results([tmp_path / number])[0][1].engine["kernels"] for number in ("0", "1")]
    assert kernels[0] == kernels[1]

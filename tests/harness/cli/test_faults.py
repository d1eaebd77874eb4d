"""Runs that go wrong, each in a process of its own, as a user would see them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow  # commands in processes of their own

FAKES = "tests.support.harness_fakes"
DEADLINE = 60


def start(fault, directory, *arguments, prefix=()):
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", FAKES, fault, directory, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finish(process):
    _, stderr = process.communicate(timeout=DEADLINE)
    return process.returncode, stderr.strip()


def assert_no_result(directory):
    assert not directory.exists()
    partial = directory.with_name(directory.name + ".partial")
    assert not list(partial.glob("result.json"))
    assert not list(partial.glob("mlperf_log_accuracy.json"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("warm-up", "RuntimeError: no more memory"),
        ("raise", "RuntimeError: no more memory"),
        ("nan", "NaN or infinite"),
        ("shape", r"detections (1, 5, 6)"),
        ("dtype", "float64 detections"),
        ("count", "count of 6..6 detections; 0..5"),
        ("nothing", "TypeError"),
        ("load", "Input/output error"),
    ],
)
def test_a_faulty_engine_ends_the_run(fault, message, tmp_path):
    code, stderr = finish(start(fault, tmp_path / "run", "SingleStream", "AccuracyOnly"))
    assert code == 1, stderr
    assert stderr.startswith("SingleStream AccuracyOnly: ")
    assert message in stderr
    assert "\n" not in stderr
    assert_no_result(tmp_path / "run")


@pytest.mark.parametrize("mode", ["PerformanceOnly", "AccuracyOnly"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("images", "an image index that is not its image's"),
        ("background", "a label outside"),
        ("scores", "a higher score"),
        ("corners", "corners are swapped"),
    ],
)
def test_detections_that_contradict_themselves_end_the_run(fault, message, mode, tmp_path):
    code, stderr = finish(start(fault, tmp_path / "run", "Offline", mode))
    assert code == 1, stderr
    assert stderr.startswith(f"Offline {mode}: the engine returned ")
    assert message in stderr
    assert_no_result(tmp_path / "run")


@pytest.mark.parametrize("fault", ["raise", "block"])
@pytest.mark.parametrize("mode", ["PerformanceOnly", "AccuracyOnly"])
@pytest.mark.parametrize("scenario", ["Offline", "Server", "SingleStream", "MultiStream"])
def test_every_scenario_ends(scenario, mode, fault, tmp_path):
    code, stderr = finish(start(fault, tmp_path / "run", scenario, mode, "0.5"))
    assert code == 1, stderr
    assert ("no sample was completed for 0.5 s" if fault == "block" else "no more") in stderr
    assert "\n" not in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_one_session_that_blocks_ends_the_run_though_the_other_goes_on(scenario, tmp_path):
    arguments = (scenario, "PerformanceOnly", "0.5", "2")
    code, stderr = finish(start("block in result", tmp_path / "run", *arguments))
    assert code == 1, stderr
    assert "no sample was completed for 0.5 s" in stderr
    assert_no_result(tmp_path / "run")


@pytest.mark.parametrize("scenario", ["Offline", "Server", "SingleStream"])
@pytest.mark.parametrize("fault", ["memory in submit", "lost in result", "block in submit"])
def test_batches_in_flight_do_not_keep_a_run(scenario, fault, tmp_path):
    code, stderr = finish(start(fault, tmp_path / "run", scenario, "PerformanceOnly", "0.5"))
    assert code == 1, stderr
    message = {
        "memory": "CUDA: out of memory (cudaErrorMemoryAllocation)",
        "lost": "the GPU has fallen off the bus",
        "block": "no sample was completed for 0.5 s",
    }[fault.partition(" ")[0]]
    assert f"{scenario} PerformanceOnly: {message}" in stderr
    assert "\n" not in stderr
    assert_no_result(tmp_path / "run")


@pytest.mark.parametrize("scenario", ["Offline", "Server"])
@pytest.mark.parametrize("fault", ["slow", "block"])
def test_ctrl_c(scenario, fault, tmp_path):
    process = start(fault, tmp_path / "run", scenario, "PerformanceOnly", "1000")
    assert process.stdout.readline() == "start\n"
    detail = tmp_path / "run.partial" / "mlperf_log_detail.txt"
    deadline = time.monotonic() + DEADLINE
    while not detail.exists() or "Starting performance mode" not in detail.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, stderr = finish(process)
    assert code == 130, stderr
    assert f"{scenario} PerformanceOnly: interrupted" in stderr
    assert "\n" not in stderr
    assert_no_result(tmp_path / "run")


@pytest.mark.parametrize("mode", ["PerformanceOnly", "AccuracyOnly"])
@pytest.mark.parametrize("limit", [2048, 10_000, 18_000])
def test_files_that_must_not_grow(mode, limit, tmp_path):
    """A limit on the file size fails LoadGen's writes as a full disk does, without root."""
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        pytest.skip("needs prlimit")
    # an image has up to 5 rows of 28 bytes, in hexadecimal: the accuracy log is the longest file
    process = start("", tmp_path / "run", "Offline", mode, prefix=[prlimit, f"--fsize={limit}"])
    code, stderr = finish(process)
    assert code == 2, stderr
    assert "was the disk full?" in stderr or "cannot" in stderr
    assert "\n" not in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["PerformanceOnly", "AccuracyOnly"])
def test_a_full_disk(mode, tmp_path):
    """A small file system of each size: the result is complete, or there is none."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    unshare = ["unshare", "--map-root-user", "--mount"]
    probe = [*unshare, "mount", "-t", "tmpfs", "none", mount]
    if not shutil.which("unshare") or subprocess.call(probe):
        pytest.skip("needs a mount namespace")
    copy = tmp_path / "copy"
    script = (
        'mount -t tmpfs -o "size=$1" none "$2"; "$3" -m "$4" "" "$2/run" Offline "$5"; code=$?; '
        'test -e "$2/run" && cp -r "$2/run" "$6"; exit $code'
    )
    outcomes = set()
    for kib in (4, 16, 32, 40, 48, 200):
        shutil.rmtree(copy, ignore_errors=True)
        done = subprocess.run(
            [
                *(*unshare, "sh", "-c", script, "sh"),
                *(f"{kib}k", mount, sys.executable, FAKES, mode, copy),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        outcomes.add(done.returncode)
        if done.returncode == 0:
            assert json.loads((copy / "result.json").read_text())["mode"] == mode
        else:
            assert done.returncode == 2, done.stderr
            assert "was the disk full?" in done.stderr or "No space left" in done.stderr
            assert "Traceback" not in done.stderr
            assert not copy.exists()
    assert outcomes == {0, 2}

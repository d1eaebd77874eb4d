"""One route at a time in a build folder; a folder that cannot be written to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from harness.errors import HarnessError
from harness.loadgen.settings import load_settings
from harness.lock import locked
from harness.results.run import Benchmark, run
from tests.support import ROOT, attempt
from tests.support.harness_fakes import FakeEngine, Memory

HOLD = """
import sys, time
from pathlib import Path
from harness.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_holds_it(holder, tmp_path):
    done = attempt("-m", "harness", "make", "run", "--build-dir", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"harness: error: {tmp_path} is in use by process {holder.pid} on ")


def test_other_folders_are_free(holder, tmp_path):
    with locked(tmp_path / "other"):
        pass


def test_a_dead_holder_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        pass


def test_the_lock_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_a_run_owns_the_folder_of_its_logs(holder, tmp_path):
    """A second one would throw away what the first has written so far."""
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "log").touch()
    (settings,) = load_settings(["Offline"], None, {})
    benchmark = Benchmark((FakeEngine(),), Memory(8), None, 30)
    with pytest.raises(HarnessError, match=f"in use by process {holder.pid} .* log directory"):
        run(benchmark, settings, "PerformanceOnly", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run.partial").iterdir()] == ["log"]


@pytest.fixture
def lockless(tmp_path):
    """A program that holds a folder whose file system has no locks, until it is told to end."""

    def start(number, ending="pass"):
        code = LOCKLESS.replace("NUMBER", str(number)).replace("ENDING", ending)
        return subprocess.Popen(
            [sys.executable, "-c", code, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    return start


LOCKLESS = """
import fcntl, os, sys
from pathlib import Path
from engine.support.leaving import leave_now
from harness.errors import HarnessError
from harness.lock import locked

def flock(*_):
    raise OSError(NUMBER, os.strerror(NUMBER))

fcntl.flock = flock
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
        ENDING
except HarnessError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("ending", ["pass", "1 / 0", "leave_now(1)", "sys.exit(2)"])
def test_without_locks_a_file_stands_for_one(number, ending, lockless, tmp_path):
    first = lockless(number, ending)
    assert first.stdout.readline() == "held\n"
    second = lockless(number)
    said, warned = second.communicate("\n", timeout=60)
    assert f"{tmp_path} is in use by process {first.pid} on " in said
    assert f"where it is gone, remove {tmp_path}/lock.held" in said
    assert warned == ""
    _, warned = first.communicate("\n", timeout=60)
    assert f"warning: the file system of {tmp_path} has no locks" in warned
    assert lockless(number).communicate("\n", timeout=60)[0] == "held\n"
    assert not (tmp_path / "lock.held").exists()


def test_without_locks_a_dead_holder_is_named(lockless, tmp_path):
    first = lockless(errno.ENOLCK)
    first.stdout.readline()
    first.kill()
    first.communicate()
    said, _ = lockless(errno.ENOLCK).communicate("\n", timeout=60)
    assert f"process {first.pid} on " in said and "remove" in said
    (tmp_path / "lock.held").unlink()
    assert lockless(errno.ENOLCK).communicate("\n", timeout=60)[0] == "held\n"


def test_a_file_that_cannot_be_locked_for_another_reason_is_one_line(lockless, tmp_path):
    said, _ = lockless(errno.EIO).communicate("\n", timeout=60)
    assert said == f"{tmp_path}/lock: cannot be locked: {os.strerror(errno.EIO)}\n"


def test_a_full_disk_is_one_line(tmp_path):
    """/dev/full takes no byte."""
    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(HarnessError, match=r"lock: cannot be locked: .*"), locked(tmp_path):
        pass


def test_read_only_folder(tmp_path):
    folder = tmp_path / "build"
    folder.mkdir()
    tmp_path.chmod(0o755)
    folder.chmod(0o555)
    user = os.geteuid()
    changed = {}
    if user == 0:
        for parent in [folder, *folder.parents[:-1]]:  # pytest's are private to root
            mode = parent.stat().st_mode
            if parent.stat().st_uid == 0 and mode & 0o5 != 0o5:
                changed[parent] = mode
                parent.chmod(mode | 0o5)
        os.seteuid(65534)
    try:
        with pytest.raises(HarnessError, match=r"cannot write to it.*BUILD_DIR"):
            locked(folder).__enter__()
    finally:
        os.seteuid(user)
        for parent, mode in changed.items():
            parent.chmod(mode)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    file = tmp_path / "build"
    file.touch()
    done = attempt("-m", "harness", "make", "calibrate", "--build-dir", file)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"harness: error: {file}: cannot write to it")

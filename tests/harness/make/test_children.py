"""Programs that `harness make` starts end with it, also where it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT
from tests.support.http_files import wait_until

START = """
import sys
from harness.make import route

route.sys.executable = sys.argv[1]
route._command("export")
"""


def test_a_program_ends_with_a_killed_make(tmp_path):
    program, pid = tmp_path / "program", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {pid}.part && mv {pid}.part {pid}\nexec sleep 60\n")
    program.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", START, program], cwd=ROOT) as process:
        wait_until(pid.exists)
        process.kill()
    child = int(pid.read_text())
    try:
        wait_until(lambda: not _lives(child), 10)
    finally:
        if _lives(child):
            os.kill(child, signal.SIGKILL)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""How every command ends: usage errors, errors of files, signals."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

COMMANDS = ["engine", "harness", "graph_surgery", "export", "plugin_cuda", "engine.bench"]

APP = """
import os, signal, sys, typer
from graph_surgery.command import run_command

app = typer.Typer()

@app.command()
def main(what: str) -> None:
    try:
        if what == "wrong":
            raise ValueError("of \\x1b[31mred\\r \\udcff")
        os.kill(os.getpid(), signal.Signals[what])
        signal.pause()
    finally:
        print("cleaned up")

run_command(app, "app", ValueError)
"""


def run(*arguments, **more):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **more,
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_a_usage_error_is_one_line(module):
    done = run("-m", module, "--nonsense")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "error: No such option: --nonsense" in done.stderr
    assert "--help'" in done.stderr


def test_without_a_command_the_help_is_shown():
    done = run("-m", "engine")
    assert done.returncode == 2
    assert "quantize" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_in_order(name):
    done = run("-c", APP, name, preexec_fn=_as_usual)
    assert done.returncode == 130
    assert done.stdout == "cleaned up\n"
    assert done.stderr == ""


def test_a_hangup_that_is_ignored_stays_so():
    done = run("-c", APP.replace("signal.pause()", "0"), "SIGHUP", preexec_fn=_as_nohup)
    assert (done.returncode, done.stdout) == (0, "cleaned up\n")


def _as_usual():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup


def _as_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_what_a_terminal_would_obey_is_escaped():
    done = run("-c", APP, "wrong")
    assert done.returncode == 2
    assert done.stderr == "app: error: of \\x1b[31mred\\r \\udcff\n"

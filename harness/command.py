"""How a command ends: an error of the user or of a run is one line, without a traceback."""

from __future__ import annotations

from typing import NoReturn

import typer

import graph_surgery.command
from engine.errors import EngineError
from engine.support.leaving import leave_now
from graph_surgery.command import INTERRUPTED
from graph_surgery.errors import SurgeryError
from harness.errors import HarnessError, RunFailedError


def run_command(app: typer.Typer, name: str | None = None) -> None:
    """Run a command; see `graph_surgery.command.run_command`.

    Parameters
    ----------
    name
        Of the program in its help; None: what it was called by.
    """
    errors = (HarnessError, EngineError, SurgeryError)
    try:
        graph_surgery.command.run_command(app, "harness", *errors, program=name)
    except RunFailedError as error:
        leave(error)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # threads may wait for servers
            leave_now(INTERRUPTED)
        raise


def leave(error: RunFailedError) -> NoReturn:
    """End the process at once, see `RunFailedError`."""
    graph_surgery.command.complain("harness", error)
    leave_now(error.exit_code)

"""How a command ends: an error of the user or of a run is one line, without a traceback."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from engine.errors import EngineError
from engine.support.leaving import leave_now
from graph_surgery.errors import SurgeryError
from harness.errors import HarnessError, RunFailedError


def run_command(app: typer.Typer, name: str | None = None) -> None:
    """Run a command; an error of the user is one line on stderr and exit code 2.

    Parameters
    ----------
    name
        Of the program in its help; None: what it was called by.
    """
    try:
        app(prog_name=name)
    except (HarnessError, EngineError, SurgeryError) as error:
        _complain(error)
        sys.exit(2)
    except RunFailedError as error:
        leave(error)


def leave(error: RunFailedError) -> NoReturn:
    """End the process at once, see `RunFailedError`."""
    _complain(error)
    leave_now(error.exit_code)


def _complain(error: Exception) -> None:
    typer.echo(f"harness: error: {error}", err=True)

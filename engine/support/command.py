"""How a command ends: a user error is one line, without a traceback."""

from __future__ import annotations

import sys

import typer

from engine.errors import EngineError
from graph_surgery.errors import SurgeryError


def run_command(app: typer.Typer, name: str | None = None) -> None:
    """Run a command; what is wrong with its files is one line on stderr and exit code 2.

    Parameters
    ----------
    name
        Of the program in its help; None: what it was called by.
    """
    try:
        app(prog_name=name)
    except (EngineError, SurgeryError) as error:
        typer.echo(f"engine: error: {error}", err=True)
        sys.exit(2)

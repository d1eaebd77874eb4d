"""How a command ends: a user error is one line, without a traceback."""

from __future__ import annotations

import typer

import graph_surgery.command
from engine.errors import EngineError
from graph_surgery.errors import SurgeryError


def run_command(app: typer.Typer, name: str) -> None:
    """Run a command; see `graph_surgery.command.run_command`.

    Parameters
    ----------
    name
        Of the program in its help.
    """
    graph_surgery.command.run_command(app, "engine", EngineError, SurgeryError, program=name)

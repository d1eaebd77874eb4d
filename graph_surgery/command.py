"""How a command ends: what is wrong is one line, without a traceback or what a terminal obeys."""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer

INTERRUPTED = 130
"""Exit code after Ctrl-C, which typer gives."""

_UsageError: Any = typer.BadParameter.__base__  # typer has no name for it


def run_command(
    app: typer.Typer, name: str, *errors: type[Exception], program: str | None = None
) -> None:
    """Run a command; what is wrong with its options or files is one line and exit code 2.

    Ctrl-C and SIGTERM end it alike, with exit code 130.

    Parameters
    ----------
    name
        Stands before the message.
    errors
        What the command raises for its user.
    program
        Its name in the help; None: what it was called by.
    """
    leave_in_order()
    try:
        code = app(prog_name=program, standalone_mode=False)
    except _UsageError as error:
        said = error.format_message()
        if "\n" in said or not said:  # the help, where no argument was given
            error.show()
        else:
            complain(name, f"{said.rstrip('.')}; see '{error.ctx.command_path} --help'")
        sys.exit(2)
    except errors as error:
        complain(name, error)
        sys.exit(2)
    sys.exit(code or 0)


def leave_in_order() -> None:
    """End as Ctrl-C does when the process is told to, or its terminal is closed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)


def complain(name: str, error: object) -> None:
    """Write an error to stderr."""
    typer.echo(f"{name}: error: {printable(str(error))}", err=True)


def printable(text: str) -> str:
    """Escape what a terminal would obey: files and servers are not asked for colours."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )

"""What all commands do alike: --version, -h, spellings; what is wrong is one line, no traceback."""

from __future__ import annotations

import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

INTERRUPTED = 130
"""Exit code after Ctrl-C, which typer gives."""

_ROOT = Path(__file__).parents[1]
"""The checkout, where the project was not copied out of it."""

_HABITS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    # of the options as they are declared, and of what the user writes: both spellings of every one
    "token_normalize_func": lambda name: name.replace("_", "-"),
}

_UsageError: Any = typer.BadParameter.__base__  # typer has no name for it


def run_command(
    app: typer.Typer, name: str, *errors: type[Exception], program: str | None = None
) -> None:
    """Run a command; what is wrong with its options or files is one line and exit code 2.

    Every program has --version, every command -h, and takes each option with dashes and with
    underscores.
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
        command = get_command(app)
        command.params.append(_version_option())
        _flow(command)
        code = command.main(prog_name=program, standalone_mode=False, **_HABITS)
    except _UsageError as error:
        said = error.format_message()
        if "\n" in said or not said:  # the help, where no argument was given
            error.show()
        else:
            path = error.ctx.command_path if error.ctx else program or name
            complain(name, f"{said.rstrip('.')}; see '{path} --help'")
        sys.exit(2)
    except errors as error:
        complain(name, f"{error}{_elsewhere(str(error), sys.argv[1:])}")
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


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        try:
            version = metadata.version("ssd-resnet34-trt")
        except metadata.PackageNotFoundError:
            version = "of a folder that is not installed"
        typer.echo(f"{context.find_root().info_name} {version}")
        raise typer.Exit


def _version_alone(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Have the option that all commands get: typer makes options of functions alone."""
    del version


def _version_option() -> Any:
    alone = typer.Typer(add_completion=False)
    alone.command()(_version_alone)
    option = get_command(alone).params[0]
    option.expose_value = False
    return option


def _flow(command: Any) -> None:
    """Join the lines of each paragraph of the help, which are as long as those of the source."""
    if command.help:
        paragraphs = command.help.split("\n\n")
        command.help = "\n\n".join(" ".join(one.split()) for one in paragraphs)
    for one in getattr(command, "commands", {}).values():
        _flow(one)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be read
        return False


def _elsewhere(said: str, words: list[str]) -> str:
    """Say which of the paths that an error names are not here but in the checkout."""
    if not (_ROOT / "pyproject.toml").is_file():
        return ""
    found = [
        word
        for word in (word.partition("=")[2] or word for word in words)
        if "/" in word
        and not word.startswith(("/", "-"))
        and said.startswith(word)
        and not _exists(Path(word))
        and _exists(_ROOT / word)
    ]
    return f"; {found[0]} is not here, but in {_ROOT}: work there" if found else ""

"""Findings about a submission tree, and the readers that make them."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.support.documents import parse_json
from harness.errors import HarnessError
from harness.loadgen.log import DetailLog, read_detail
from harness.submission.description import MAY_BE_EMPTY


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes
    ----------
    path
        File or folder concerned.
    message
        What is wrong with it.
    error
        Whether the submission is refused for it; else it is a warning.
    """

    path: Path
    message: str
    error: bool = True

    def __str__(self) -> str:
        """Severity, path and message."""
        return f"{'error' if self.error else 'warning'}: {self.path}: {self.message}"


def read_log(path: Path) -> Generator[Finding, None, DetailLog | None]:
    """LoadGen's errors; returns the log, if it can be read."""
    try:
        detail = read_detail(path)
    except HarnessError as error:
        yield Finding(path, without_folder(error, path.parent))
        return None
    yield from log_errors(path, detail)
    return detail


def without_folder(error: HarnessError, folder: Path) -> str:
    """Message of an error about a file in a folder that the finding names already."""
    return str(error).replace(f"{folder}/", "")


def log_errors(path: Path, detail: DetailLog) -> Iterator[Finding]:
    """One finding for each error that LoadGen reported."""
    for message in detail.errors:
        yield Finding(path, f"LoadGen reported an error: {message}")


def summary_agrees(path: Path, detail: DetailLog) -> Iterator[Finding]:
    """Scenario and verdict of a summary, where they are not those of the detail log."""
    text = read_text(path)
    for title, key in (("Scenario", "effective_scenario"), ("Result is", "result_validity")):
        stated = re.search(rf"^{title} *: *(.*?) *$", text, re.MULTILINE)
        if stated is None or stated[1] != detail.values.get(key):
            yield Finding(
                path,
                f"{title!r} is {stated[1] if stated else 'missing'}; the detail log's {key} is "
                f"{detail.values.get(key)}",
            )


def folder_files(
    folder: Path, required: Iterable[str], optional: Iterable[str]
) -> Generator[Finding, None, bool]:
    """Missing and unexpected files; returns whether all required ones are there."""
    if not folder.is_dir():
        yield Finding(folder, "the folder is missing")
        return False
    present = {path.name for path in folder.iterdir()}
    missing = set(required) - present
    for name in sorted(missing):
        yield Finding(folder / name, "the file is missing")
    for name in sorted(present - set(required) - set(optional)):
        yield Finding(folder / name, "the file does not belong here")
    return not missing


def json_object(path: Path, fields: tuple[str, ...]) -> Generator[Finding, None, dict[str, Any]]:
    """Missing and empty fields of a JSON object; returns it, or an empty one."""
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        yield Finding(path, "the file is missing")
        return {}
    except (OSError, ValueError) as error:
        yield Finding(path, f"no JSON: {error}")
        return {}
    if not isinstance(values, dict):
        yield Finding(path, "no JSON object")
        return {}
    for key in fields:
        if key not in values:
            yield Finding(path, f"field {key!r} is missing")
        elif values[key] == "" and key not in MAY_BE_EMPTY:
            yield Finding(path, f"field {key!r} is empty", error=False)
    return values


def read_text(path: Path) -> str:
    """Text of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def folders(path: Path) -> list[Path]:
    """Folders in a folder, by name; none if it is missing."""
    return sorted(item for item in path.iterdir() if item.is_dir()) if path.is_dir() else []

"""Artefacts of the route: files that know what they were made from.

Beside every artefact lies ``<name>.inputs.json``: the SHA-256, or the value, of everything that it
was made from, and its own SHA-256. An artefact is used only when all of that still holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import engine
from engine.data.preprocessed import MANIFEST
from engine.errors import EngineError
from engine.support.documents import read_as
from engine.support.environment import distribution
from engine.support.external import model_sha256
from engine.support.files import file_sha256, write_atomically
from harness.errors import HarnessError

Say = Callable[[str], None]

TRANSFORM_CODE = "harness/data/transform.py"
"""What turns an image into an input."""

MISSING = "there is none"
"""Reason to make what was never made."""


@dataclass(frozen=True)
class Artefact:
    """Something that is made from something.

    Attributes
    ----------
    step
        What makes it, for messages.
    path
        File, or folder of a preprocessed set.
    inputs
        What it is made from: name to SHA-256 or value. The names stand in messages.
    """

    step: str
    path: Path
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class _Record:
    """What an artefact was made from, and its own SHA-256."""

    inputs: Mapping[str, str]
    sha256: str


def stale(artefact: Artefact) -> str | None:
    """Say why an artefact has to be made (again); None when it is current."""
    content = _content(artefact.path)
    if not content.exists():
        return MISSING
    record = _record(artefact)
    if record is None or not record.inputs:
        return "nothing tells what it was made from"
    made_from = record.inputs
    names = [*artefact.inputs, *(name for name in made_from if name not in artefact.inputs)]
    changed = [name for name in names if artefact.inputs.get(name) != made_from.get(name)]
    if changed:
        return f"{', '.join(changed)} changed"
    try:
        same = record.sha256 == model_sha256(content)
    except FileNotFoundError:  # a file with its data
        same = False
    return None if same else "it was changed after it was made"


def make(artefact: Artefact, build: Callable[[], object], say: Say) -> Path:
    """Build an artefact unless it is current, and say in one line which of both, and why.

    Raises
    ------
    HarnessError
        When a file cannot be read or written, or the builder left nothing.
    """
    reason = stale(artefact)
    if reason is None:
        say(f"{artefact.step}: reused {artefact.path}")
    else:
        remake(artefact, build, say, reason)
    return artefact.path


def remake(artefact: Artefact, build: Callable[[], object], say: Say, reason: str) -> None:
    """Build an artefact and record its inputs; see `make`."""
    verb = "making" if reason == MISSING else f"rebuilding because {reason}:"
    say(f"{artefact.step}: {verb} {artefact.path}")
    with recorded(artefact):
        build()


@contextmanager
def recorded(artefact: Artefact) -> Iterator[None]:
    """Record the inputs of an artefact that is made within; of a failure nothing is recorded.

    Raises
    ------
    HarnessError
        When a file cannot be read or written.
    """
    record = _record_path(artefact)
    try:
        artefact.path.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)  # what is interrupted counts as never made
        yield
        made = _Record(dict(artefact.inputs), model_sha256(_content(artefact.path)))
        write_atomically(record, (json.dumps(asdict(made), indent=1) + "\n").encode())
    except OSError as error:
        raise HarnessError(
            f"{artefact.step}: {error.filename or artefact.path}: {error.strerror}"
        ) from error


def code_sha256(*patterns: str) -> str:
    """Hash of the project's own source files, e.g. of ``export/*.py``.

    Raises
    ------
    HarnessError
        A pattern matches none: what was moved would no longer be watched.
    """
    root = Path(engine.__file__).parent.parent
    digest = sha256()
    for pattern in patterns:
        paths = sorted(root.glob(pattern))
        if not paths:
            raise HarnessError(f"{root / pattern}: no such file of the project")
        for path in paths:
            digest.update(f"{path.relative_to(root)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def version(package: str) -> str:
    """Version of an installed package, or of one that stands in; ``none`` where there is none."""
    return distribution(package)[1] or "none"


def _content(path: Path) -> Path:
    """Return the file that stands for an artefact; the manifest of a set lists all its images."""
    return path / MANIFEST if path.is_dir() else path


def _record_path(artefact: Artefact) -> Path:
    return artefact.path.with_name(f"{artefact.path.name}.inputs.json")


def _record(artefact: Artefact) -> _Record | None:
    """Read a record; None where it is missing or damaged."""
    try:
        return read_as(_Record, _record_path(artefact))
    except EngineError:
        return None

"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from engine.errors import EngineError


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts one after the other to a file that appears only when it is complete.

    Parameters
    ----------
    path
        Target; replaced when it exists. Until the rename the data lies beside it under a name
        that ends in ``.tmp``.
    parts
        Bytes or C-contiguous buffers of bytes.

    Raises
    ------
    OSError
        The file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            for part in parts:
                rest = memoryview(part)
                while rest:  # a raw write is partial when the disk fills up or a signal comes
                    rest = rest[file.write(rest) :]
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all; null stands for a number that is not finite.

    Raises
    ------
    EngineError
        When it cannot be written.
    """
    text = json.dumps(_finite(document), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise EngineError(f"{path}: cannot write it: {error.strerror}") from error


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import EngineError
from graph_surgery.errors import SurgeryError


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


def write_output(path: Path, content: bytes, *, overwrite: bool) -> bool:
    """Write a file that a user named.

    Parameters
    ----------
    overwrite
        Whether another file may be replaced.

    Returns
    -------
    Whether it was written: a file that holds the very same is left.

    Raises
    ------
    EngineError
        When it cannot be written, or another file is there.
    """
    try:
        if path.exists():
            if path.read_bytes() == content:
                return False
            if not overwrite:
                raise another(path)
        write_atomically(path, content)
    except OSError as error:
        raise EngineError(f"{path}: cannot write it: {error.strerror}") from error
    return True


def check_output(output: Path, read: Iterable[Path]) -> None:
    """Refuse to write what is read, or where nothing can be written; `graph_surgery.files`'s.

    Of ONNX files, their data in other files is read as well.

    Raises
    ------
    EngineError
        Says which.
    """
    from engine.support.external import data_files
    from graph_surgery.files import check_output as check  # it needs onnx, which servers lack

    whole = list(read)
    for path in [path for path in whole if path.suffix == ".onnx" and path.is_file()]:
        with suppress(OSError):  # the command says it
            whole += [path.parent / name for name in data_files(path)]
    try:
        check(output, whole)
    except SurgeryError as error:
        raise EngineError(str(error)) from error


def another(path: Path) -> EngineError:
    """Say that a file that a user named exists, and is not what would be written."""
    return EngineError(f"{path}: exists already, and is another: remove it or pass --force")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears only when it is complete, under a name of this process until then.

    Raises
    ------
    OSError
        It cannot be made, or there is one of its name that is not empty; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of the same number that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            error.filename = str(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all; see `json_text`.

    Raises
    ------
    EngineError
        When it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(document))
    except OSError as error:
        raise EngineError(f"{path}: cannot write it: {error.strerror}") from error


def json_text(document: Mapping[str, object]) -> bytes:
    """Content of a JSON file; null stands for a number that is not finite."""
    return (json.dumps(_finite(document), indent=2) + "\n").encode()


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

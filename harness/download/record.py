"""What a folder's downloads were: SHA-256 of every file, and one download at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from engine.support.documents import read_as
from engine.support.files import write_atomically
from harness.errors import HarnessError, as_harness_error
from harness.lock import locked

RECORD = "downloads.json"


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("a SHA-256 in hex")
    return text


_Sha256 = Annotated[str, AfterValidator(_sha256)]


def load_record(folder: Path) -> dict[str, str]:
    """Read the record of a folder.

    Parameters
    ----------
    folder
        Folder of the downloads.

    Returns
    -------
    dict
        File name, relative to the folder, to SHA-256 in hex; empty without a record.

    Raises
    ------
    HarnessError
        The record is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    remedy = "it holds file names and their SHA-256; remove it, and what is there is recorded anew"
    with as_harness_error():
        return read_as(dict[str, _Sha256], path, remedy)


def save_record(folder: Path, record: Mapping[str, str]) -> None:
    """Write the record of a folder, one file a line."""
    text = json.dumps(dict(sorted(record.items())), indent=0) + "\n"
    write_atomically(folder / RECORD, text.encode())


@contextmanager
def sole_download(folder: Path) -> Iterator[None]:
    """Make the folder and keep it for one download.

    Raises
    ------
    HarnessError
        Another process downloads into the folder, or files there cannot be read or written.
    """
    with locked(folder):
        try:
            yield
        except OSError as error:
            what = f"{error.filename or folder}: {error.strerror or error}"
            raise HarnessError(f"{what}; BUILD_DIR moves the build folder") from error

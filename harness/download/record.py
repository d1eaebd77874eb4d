"""What a folder's downloads were: digests of the files, and one download at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from engine.support.documents import read_as
from engine.support.files import file_sha256, write_atomically
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


def mismatch(path: Path, *, sha256: str | None, md5: str | None) -> str | None:
    """Say which digest of a file is not the known one, in hex; None: none is."""
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        return f"its SHA-256 is {found}, not {sha256}"
    if md5 is None:
        return None
    with path.open("rb") as file:
        # the publisher's only digest: it tells a damaged file, not a forged one
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return None if found == md5 else f"its MD5 is {found}, not {md5}"


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

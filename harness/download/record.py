"""What a folder's downloads were: SHA-256 of every file, and one download at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.support.files import write_atomically
from harness.errors import HarnessError
from harness.lock import locked

RECORD = "downloads.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        record = None
    if not isinstance(record, dict) or not all(
        isinstance(value, str) and _SHA256.fullmatch(value) for value in record.values()
    ):
        raise HarnessError(
            f"{path} is damaged: it holds file names and their SHA-256; remove it, and what is "
            "there is recorded anew"
        )
    return record


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

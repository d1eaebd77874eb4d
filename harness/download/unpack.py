"""Chosen files of a zip archive, each whole or absent."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from engine.support.files import write_atomically
from engine.support.progress import Progress
from harness.disk import require_space
from harness.errors import HarnessError


def unpack(
    archive: Path, names: Sequence[str], folder: Path, progress: Progress | None = None
) -> dict[str, str]:
    """Extract files; those that are there already, with the same content, are left alone.

    Parameters
    ----------
    archive
        Zip file.
    names
        What to extract. Nothing else of the archive is touched, whatever it is called.
    folder
        Existing folder that the names lead from.
    progress
        Called with the files done and their number.

    Returns
    -------
    dict
        Name to SHA-256 in hex, for every name.

    Raises
    ------
    HarnessError
        Not a zip file, or a damaged one; a name is not in it; a file with another content stands
        in the way; the disk is too full.
    OSError
        A file cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            members = [_member(source, archive, name) for name in names]
            absent = [item for item in members if not (folder / item.filename).exists()]
            require_space(folder, sum(item.file_size for item in absent))
            digests = {}
            for done, member in enumerate(members, start=1):
                digests[member.filename] = _unpack_one(source, member, folder)
                if progress is not None:
                    progress(done, len(members))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise HarnessError(
            f"{archive} is no intact zip file ({error}); remove it to download it again"
        ) from error
    return digests


def _member(source: zipfile.ZipFile, archive: Path, name: str) -> zipfile.ZipInfo:
    try:
        return source.getinfo(name)
    except KeyError:
        raise HarnessError(f"{archive} holds no {name}") from None


def _unpack_one(source: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> str:
    """SHA-256 of the file, which is in place afterwards."""
    path = folder / member.filename
    content = source.read(member)  # zipfile compares the CRC-32
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    elif path.read_bytes() != content:
        raise HarnessError(
            f"{path} is not the {member.filename} of {source.filename}; move it away and run the "
            "command again"
        )
    return sha256(content).hexdigest()

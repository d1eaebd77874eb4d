"""Names of preprocessed sets: one of its own for each, and a link to the newest.

A complete set is called ``NAME-<hash>`` by all that it was made from, NAME becomes a link to it,
and nothing writes there again. Sets that NAME led to before are removed unless somebody reads them;
the next call removes those, too.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any

from engine.data.preprocessed import JOURNAL, MANIFEST, SetManifest
from engine.support.documents import parse_json
from engine.support.locks import lock
from harness.artefacts import Say
from harness.errors import HarnessError

_REMOVED = f"{MANIFEST}.removed"
"""What becomes of the manifest of a set that is being removed."""


def name_to_write(out_dir: Path) -> Path:
    """Follow the user's own links, as to another disk, to the name that a set gets.

    Raises
    ------
    HarnessError
        A loop of links, no name, or a set itself, which is never written again.
    """
    if not out_dir.name:
        raise HarnessError(f"{out_dir}: name a folder for the preprocessed images")
    try:
        out_dir.resolve(strict=out_dir.is_symlink() and not out_dir.exists())
    except FileNotFoundError:  # a link to what is not there any more
        pass
    except (OSError, RuntimeError) as error:
        raise HarnessError(f"{out_dir}: a loop of links") from error
    while out_dir.is_symlink() and not _is_made_for(out_dir, out_dir.readlink().name):
        out_dir = out_dir.parent / out_dir.readlink()
    if not out_dir.is_symlink() and _is_whole_set(out_dir, MANIFEST):
        name = out_dir.with_name(out_dir.name.rpartition("-")[0])
        raise HarnessError(
            f"{out_dir} is a finished set, which is never written again; name {name}, which leads "
            "to the newest"
        )
    return out_dir


def take_over(out_dir: Path, partial: Path) -> None:
    """Let a set that has the name itself, as they had before, be the one to complete.

    Raises
    ------
    HarnessError
        Something else has it.
    """
    if out_dir.is_symlink() or not out_dir.exists():
        return
    if (out_dir / MANIFEST).exists() or (out_dir / JOURNAL).exists():
        out_dir.rename(partial)
    elif not out_dir.is_dir() or any(out_dir.iterdir()):
        raise HarnessError(f"{out_dir} is there and holds no preprocessed images; move it away")
    else:
        out_dir.rmdir()


def publish(partial: Path, out_dir: Path, manifest: SetManifest) -> None:
    """Give a complete set a name of its own, which says what it was made from, and link it."""
    stem = f"{out_dir.name}-{_digest(asdict(manifest))}"
    names = chain([stem], (f"{stem}.{number}" for number in count(2)))  # the same, made again
    whole = next(path for name in names if not (path := out_dir.with_name(name)).exists())
    partial.rename(whole)
    link = out_dir.with_name(f"{out_dir.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(whole.name)
    link.replace(out_dir)


def remove_others(out_dir: Path, say: Say) -> None:
    """Remove the sets that were linked by `out_dir` before, but for those that are being read."""
    current = out_dir.readlink().name
    for other in sorted(out_dir.parent.iterdir()):
        if other.name == current or not _is_made_for(out_dir, other.name):
            continue
        manifest = other / MANIFEST
        # whatever else is called so is not ours
        if other.is_symlink() or not any(_is_whole_set(other, n) for n in (MANIFEST, _REMOVED)):
            continue
        if manifest.exists():
            try:
                with manifest.open("r+b") as file:  # an exclusive lock of NFS wants it so
                    has_locks = lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if has_locks:  # first: without it the folder passes for no set
                        manifest.rename(other / _REMOVED)
            except BlockingIOError:
                say(f"kept {other}, which is being read; the next preprocessing removes it")
                continue
            except OSError as error:  # the new set is there all the same
                say(f"kept {other}: its {MANIFEST} cannot be locked ({error.strerror})")
                continue
            if not has_locks:
                say(f"kept {other}: its file system has no locks, which tell whether it is read")
                continue
        shutil.rmtree(other)
        say(f"removed {other}, which {out_dir} was before")


def _is_made_for(out_dir: Path, name: str) -> bool:
    """Tell whether a set of this name is, or was, linked by `out_dir`."""
    return re.fullmatch(rf"{re.escape(out_dir.name)}-[0-9a-f]{{12}}(\.\d+)?", name) is not None


def _is_whole_set(folder: Path, manifest: str) -> bool:
    """Tell whether a folder has the name that its manifest gives it."""
    try:
        digest = _digest(parse_json((folder / manifest).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return re.fullmatch(rf".+-{digest}(\.\d+)?", folder.name) is not None


def _digest(manifest: Mapping[str, Any]) -> str:
    images = [(entry["file"], entry["sha256"]) for entry in manifest["images"]]
    made_from = json.dumps({**manifest, "images": images}, sort_keys=True)
    return sha256(made_from.encode()).hexdigest()[:12]

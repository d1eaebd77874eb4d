"""What the downloads share: files that are there are checked, others fetched, and all recorded.

A file that is there is never overwritten. It has to have the digests that are known for it, and
where no SHA-256 is, the one recorded in ``downloads.json`` when it was first seen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engine.support.files import file_sha256
from engine.support.progress import Progress, progress_bar
from harness.benchmarks import Remote
from harness.download.record import RECORD, mismatch, save_record
from harness.download.transfer import Notify, StatusError, fetch
from harness.errors import HarnessError

_PARALLEL = 8
_RECORDED = 500


@dataclass(frozen=True)
class Fetched:
    """What is in place now.

    Attributes
    ----------
    place
        File or folder.
    files
        Number of files, all of them checked.
    new
        How many of them this run fetched.
    """

    place: Path
    files: int
    new: int


@dataclass(frozen=True)
class Job:
    """What the downloads of one run share.

    Attributes
    ----------
    folder
        Where the files go.
    record
        The folder's, name to SHA-256; see `harness.download.record`.
    mirror, notify
        See `harness.download.download.download_data`.
    """

    folder: Path
    record: dict[str, str]
    mirror: str | None
    notify: Notify


def apply_mirror(url: str, mirror: str | None) -> str:
    """Put a mirror in the place of a URL's scheme and host; the path goes behind the mirror's own.

    Raises
    ------
    HarnessError
        The mirror is no http or https URL.
    """
    if mirror is None:
        return url
    try:
        parts = urlsplit(mirror)
        plain = parts.hostname and parts.port != 0 and parts.username is None and not parts.query
    except ValueError:
        plain = False
    if not plain or parts.scheme not in ("http", "https"):
        raise HarnessError(
            f"--mirror {mirror}: give an address such as https://mirror.example/coco"
        )
    return mirror.rstrip("/") + urlsplit(url).path


def absent(job: Job, names: Sequence[str], known: Remote | None = None) -> list[str]:
    """The names that are not there. Those that are there have to be right.

    `known` is the file of the only name; a SHA-256 that is not known is the record's, or told it.

    Raises
    ------
    HarnessError
        One that is there is another file.
    """
    sha256, md5 = (known.sha256, known.md5) if known else (None, None)
    missing, first_seen = [], {}
    for name in names:
        path = job.folder / name
        if not path.exists():
            missing.append(name)
            continue
        expected = sha256 or job.record.get(name)
        if problem := mismatch(path, sha256=expected, md5=md5):
            keep = f", or remove its line from {job.folder / RECORD} to keep it"
            raise HarnessError(
                f"{path} is not the file that belongs there: {problem}; move it away to download "
                f"it again{'' if sha256 or md5 else keep}"
            )
        if expected is None:
            first_seen[name] = file_sha256(path)
    if first_seen:
        job.record.update(first_seen)
        save_record(job.folder, job.record)
        first, more = next(iter(first_seen)), len(first_seen) - 1
        what = first if not more else f"{first} and {more} more"
        job.notify(f"{job.folder}: {what} found; SHA-256 now recorded in {RECORD}")
    return missing


def fetch_file(job: Job, file: Remote, name: str | None = None) -> None:
    """Fetch one large file into the folder, with a bar in megabytes, and record it.

    `name` leads from the folder to it; None: the file's own. Raises HarnessError where it cannot be
    had.
    """
    name = name or file.name
    target = job.folder / name
    target.parent.mkdir(exist_ok=True)
    try:
        with progress_bar(f"{file.name} (MB)") as bar:
            job.record[name] = fetch(
                apply_mirror(file.url, job.mirror),
                target,
                sha256=file.sha256 or job.record.get(name),
                md5=file.md5,
                size=file.size,
                spare=file.unpacked,
                notify=job.notify,
                progress=None if bar is None else _megabytes(bar),
            )
    except StatusError as error:
        raise HarnessError(
            f"{error}; take another server with --mirror, or put the file at {target} yourself"
        ) from error
    save_record(job.folder, job.record)


def fetch_images(job: Job, urls: Mapping[str, str], image_dir: Path, otherwise: str) -> None:
    """Fetch single images, several at once, and record them.

    Parameters
    ----------
    job
        The run's.
    urls
        Address of each by its name, which leads from the job's folder.
    image_dir
        Where they all go; made when absent.
    otherwise
        What to do where the server does not give them, for the message.

    Raises
    ------
    HarnessError
        One cannot be had; what has arrived is kept.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()

    def fetch_image(name: str) -> None:
        job.record[name] = fetch(
            apply_mirror(urls[name], job.mirror),
            job.folder / name,
            sha256=job.record.get(name),
            notify=job.notify,
            stop=stop,
        )

    pool = ThreadPoolExecutor(_PARALLEL)
    with progress_bar(str(image_dir.relative_to(job.folder))) as bar:
        pending = [pool.submit(fetch_image, name) for name in urls]
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                future.result()
                if done % _RECORDED == 0:  # so that a killed run leaves few without a record
                    save_record(job.folder, dict(job.record))
                if bar is not None:
                    bar(done, len(urls))
        except StatusError as error:
            raise HarnessError(
                f"{error}; images are fetched one by one, and this server does not give them: put "
                f"them into {image_dir} yourself ({otherwise}), or take another server with "
                "--mirror"
            ) from error
        finally:
            stop.set()
            # after Ctrl-C nobody waits for a server; what has arrived is kept
            waited = not isinstance(sys.exception(), KeyboardInterrupt)
            pool.shutdown(wait=waited, cancel_futures=True)
            save_record(job.folder, dict(job.record))


def _megabytes(bar: Progress) -> Progress:
    """Bytes to a bar of whole megabytes, which is drawn only when they change."""
    shown = -1

    def show(done: int, total: int | None) -> None:
        nonlocal shown
        if done // 10**6 != shown:
            shown = done // 10**6
            bar(shown, None if total is None else total // 10**6)

    return show

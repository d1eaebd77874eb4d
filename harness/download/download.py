"""The benchmark's data and models: where they come from, where they go, and that they are right.

A file that is there is never overwritten. It has to have the SHA-256 that is known for it or, where
none is, the one recorded in ``downloads.json`` when it was first seen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from engine.data.coco import load_annotations
from engine.support.files import file_sha256
from engine.support.progress import Progress, progress_bar
from harness.benchmarks import Description, Remote
from harness.data.dataset import Dataset, known_dataset, load_map
from harness.disk import require_space
from harness.download.record import RECORD, load_record, save_record, sole_download
from harness.download.transfer import Notify, StatusError, arrived, fetch
from harness.download.unpack import unpack
from harness.errors import HarnessError

# images.cocodataset.org has no certificate of its own name, hence http
COCO_SERVER = "http://images.cocodataset.org"
_PARALLEL = 8
_IMAGE_SIZE = 163_500
"""Bytes of a train2017 image on average: the archive's 19,336,861,798 over 118,287 images."""


# Sizes and SHA-256 of the archives: TensorFlow Datasets, url_checksums/coco.txt; torchvision's
# prototype COCO data set has the same SHA-256.
IMAGES = Remote(
    f"{COCO_SERVER}/zips/val2017.zip",
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    815_585_330,
    unpacked=814_705_164,
)
ANNOTATIONS = Remote(
    f"{COCO_SERVER}/annotations/annotations_trainval2017.zip",
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    252_907_541,
    unpacked=20_000_000,
)


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
class _Job:
    """What the downloads of one run share. `record` is the folder's, name to SHA-256."""

    folder: Path
    record: dict[str, str]
    mirror: str | None
    notify: Notify


def download_coco(build_dir: Path, mirror: str | None, notify: Notify) -> tuple[Fetched, ...]:
    """Put COCO val2017, its annotations and the calibration images in place.

    The images are those of the data set's map files. Both archives are removed once what is wanted
    of them is unpacked; the calibration images are fetched one by one.

    Parameters
    ----------
    build_dir
        The build folder; map files lie relative to the repository root.
    mirror
        URL that stands for scheme and host of the files' own URLs; None: none.
    notify
        Told about failed tries and about files recorded on first use.

    Returns
    -------
    tuple of Fetched
        Annotations, validation images, calibration images.

    Raises
    ------
    HarnessError
        A file cannot be had, is not the right one, or does not fit on the disk; another download
        into the same folder is under way.
    """
    val = known_dataset("coco", "val", build_dir)
    cal = known_dataset("coco", "cal", build_dir)
    folder = val.image_dir.parent
    val_names = [f"{val.image_dir.name}/{name}" for name in load_map(val.map_file)]
    cal_names = [f"{cal.image_dir.name}/{name}" for name in load_map(cal.map_file)]
    annotations = ["annotations/instances_val2017.json"]
    with sole_download(folder):
        job = _Job(folder, load_record(folder), mirror, notify)
        archives = {ANNOTATIONS: annotations, IMAGES: val_names}
        absent = {archive: _absent(job, names) for archive, names in archives.items()}
        absent_cal = _absent(job, cal_names)
        needed = _IMAGE_SIZE * len(absent_cal)
        for archive, names in archives.items():
            if absent[archive]:
                needed += (archive.size or 0) - arrived(folder / archive.name)
                needed += archive.unpacked * len(absent[archive]) // len(names)
        require_space(folder, needed)
        for archive, names in archives.items():
            if absent[archive]:
                _fetch_archive(job, archive, names)
        _fetch_images(job, absent_cal, cal)
    return (
        Fetched(folder / annotations[0], 1, len(absent[ANNOTATIONS])),
        Fetched(val.image_dir, len(val_names), len(absent[IMAGES])),
        Fetched(cal.image_dir, len(cal_names), len(absent_cal)),
    )


def download_models(
    benchmark: Description, build_dir: Path, mirror: str | None, notify: Notify
) -> tuple[Fetched, ...]:
    """Put a benchmark's checkpoint and its official ONNX export in place.

    Parameters, result and errors are those of `download_coco`.
    """
    folder = build_dir / benchmark.weights.parent
    done = []
    with sole_download(folder):
        job = _Job(folder, load_record(folder), mirror, notify)
        for model in benchmark.models:
            absent = _absent(job, [model.name], model.sha256)
            if absent:
                _fetch_file(job, model)
            done.append(Fetched(folder / model.name, 1, len(absent)))
    return tuple(done)


def check_demo() -> tuple[Fetched, ...]:
    """Check that the shipped demo set is whole; it is used where it lies.

    Raises
    ------
    HarnessError, EngineError
        An image of its maps or the annotations are missing or damaged.
    """
    from harness.data.transform import BadImageError, decode, read_image

    done = []
    for split in ("val", "cal"):
        data = known_dataset("demo", split, Path())
        names = load_map(data.map_file)
        for name in names:
            try:
                decode(read_image(data.image_dir / name)[0])
            except BadImageError as error:
                raise HarnessError(
                    f"{data.image_dir / name} is missing or damaged; it is part of the "
                    "repository: restore it"
                ) from error
        if data.annotations is not None:
            load_annotations(data.annotations)
            done.append(Fetched(data.annotations, 1, 0))
        done.append(Fetched(data.image_dir, len(names), 0))
    return tuple(done)


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


def _absent(job: _Job, names: Sequence[str], known: str | None = None) -> list[str]:
    """The names that are not there. Those that are there have to be right.

    `known` is the SHA-256 of the only name; otherwise the record has it, or gets it.
    """
    absent, first_seen = [], {}
    for name in names:
        path = job.folder / name
        if not path.exists():
            absent.append(name)
            continue
        found = file_sha256(path)
        expected = known or job.record.get(name)
        if expected not in (None, found):
            raise HarnessError(
                f"{path} is not the file that belongs there: its SHA-256 is {found}, not "
                f"{expected}; move it away to download it again"
                + ("" if known else f", or remove its line from {job.folder / RECORD} to keep it")
            )
        if expected is None:
            first_seen[name] = found
    if first_seen:
        job.record.update(first_seen)
        save_record(job.folder, job.record)
        first, more = next(iter(first_seen)), len(first_seen) - 1
        what = first if not more else f"{first} and {more} more"
        job.notify(f"{job.folder}: {what} found; SHA-256 now recorded in {RECORD}")
    return absent


def _fetch_file(job: _Job, file: Remote) -> None:
    """Fetch one large file into the folder, with a bar in megabytes, and record it."""
    target = job.folder / file.name
    try:
        with progress_bar(f"{file.name} (MB)") as bar:
            job.record[file.name] = fetch(
                apply_mirror(file.url, job.mirror),
                target,
                sha256=file.sha256 or job.record.get(file.name),
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


def _fetch_archive(job: _Job, archive: Remote, names: Sequence[str]) -> None:
    """Fetch an archive, unpack the names and remove it."""
    if _absent(job, [archive.name], archive.sha256):
        _fetch_file(job, archive)
    path = job.folder / archive.name
    with progress_bar(f"unpacking {archive.name}") as bar:
        job.record.update(unpack(path, names, job.folder, bar))
    save_record(job.folder, job.record)
    path.unlink()


def _fetch_images(job: _Job, names: Sequence[str], data: Dataset) -> None:
    """Fetch single images, several at once."""
    data.image_dir.mkdir(exist_ok=True)
    stop = threading.Event()

    def fetch_image(name: str) -> None:
        job.record[name] = fetch(
            apply_mirror(f"{COCO_SERVER}/{quote(name)}", job.mirror),
            job.folder / name,
            sha256=job.record.get(name),
            notify=job.notify,
            stop=stop,
        )

    pool = ThreadPoolExecutor(_PARALLEL)
    with progress_bar(data.image_dir.name) as bar:
        pending = [pool.submit(fetch_image, name) for name in names]
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                future.result()
                if bar is not None:
                    bar(done, len(names))
        except StatusError as error:
            raise HarnessError(
                f"{error}; the images of {data.map_file} are fetched one by one, and this server "
                f"does not give them: put them into {data.image_dir} yourself (COCO's are in "
                "train2017.zip, 18 GB, which is not downloaded unasked), or take another server "
                "with --mirror"
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

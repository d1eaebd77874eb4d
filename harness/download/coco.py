"""COCO: two archives, and single images of a third."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from engine.support.progress import progress_bar
from harness.benchmarks import Remote
from harness.data.dataset import known_dataset, load_map
from harness.disk import require_space
from harness.download.files import Fetched, Job, absent, fetch_file, fetch_images
from harness.download.record import load_record, save_record, sole_download
from harness.download.transfer import Notify, arrived
from harness.download.unpack import unpack

# images.cocodataset.org has no certificate of its own name, hence http
_SERVER = "http://images.cocodataset.org"
_IMAGE_SIZE = 163_500
"""Bytes of a train2017 image on average: the archive's 19,336,861,798 over 118,287 images."""

# Sizes and SHA-256 of the archives: TensorFlow Datasets, url_checksums/coco.txt; torchvision's
# prototype COCO data set has the same SHA-256.
IMAGES = Remote(
    f"{_SERVER}/zips/val2017.zip",
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    815_585_330,
    unpacked=814_705_164,
)
ANNOTATIONS = Remote(
    f"{_SERVER}/annotations/annotations_trainval2017.zip",
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    252_907_541,
    unpacked=20_000_000,
)


def download_coco(build_dir: Path, mirror: str | None, notify: Notify) -> tuple[Fetched, ...]:
    """Put COCO val2017, its annotations and the calibration images in place.

    The images are those of the data set's map files. Both archives are removed once what is wanted
    of them is unpacked; the calibration images are fetched one by one. Parameters, result and
    errors are those of `harness.download.download.download_data`.
    """
    val = known_dataset("coco", "val", build_dir)
    cal = known_dataset("coco", "cal", build_dir)
    folder = val.image_dir.parent
    val_names = [f"{val.image_dir.name}/{name}" for name in load_map(val.map_file)]
    cal_names = [f"{cal.image_dir.name}/{name}" for name in load_map(cal.map_file)]
    annotations = ["annotations/instances_val2017.json"]
    with sole_download(folder):
        job = Job(folder, load_record(folder), mirror, notify)
        archives = {ANNOTATIONS: annotations, IMAGES: val_names}
        missing = {archive: absent(job, names) for archive, names in archives.items()}
        missing_cal = absent(job, cal_names)
        needed = _IMAGE_SIZE * len(missing_cal)
        for archive, names in archives.items():
            if missing[archive]:
                needed += (archive.size or 0) - arrived(folder / archive.name)
                needed += archive.unpacked * len(missing[archive]) // len(names)
        require_space(folder, needed)
        for archive, names in archives.items():
            if missing[archive]:
                _fetch_archive(job, archive, names)
        urls = {name: f"{_SERVER}/{quote(name)}" for name in missing_cal}
        otherwise = "COCO's are in train2017.zip, 18 GB, which is not downloaded unasked"
        fetch_images(job, urls, cal.image_dir, otherwise)
    return (
        Fetched(folder / annotations[0], 1, len(missing[ANNOTATIONS])),
        Fetched(val.image_dir, len(val_names), len(missing[IMAGES])),
        Fetched(cal.image_dir, len(cal_names), len(missing_cal)),
    )


def _fetch_archive(job: Job, archive: Remote, names: Sequence[str]) -> None:
    """Fetch an archive, unpack the names and remove it."""
    if absent(job, [archive.name], archive):
        fetch_file(job, archive)
    path = job.folder / archive.name
    with progress_bar(f"unpacking {archive.name}") as bar:
        job.record.update(unpack(path, names, job.folder, bar))
    save_record(job.folder, job.record)
    path.unlink()

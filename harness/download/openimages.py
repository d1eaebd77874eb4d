"""Open Images: two CSV files, and single images of the validation and the training split."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from engine.data.coco import load_annotations
from engine.errors import EngineError
from engine.support.files import write_atomically
from engine.support.progress import progress_bar
from harness.benchmarks import Remote
from harness.data.dataset import MAPS, SHIPPED, check_image_name, known_dataset, load_map
from harness.disk import require_space
from harness.download.boxes import Box, coco_annotations, read_boxes
from harness.download.files import Fetched, Job, absent, fetch_file, fetch_images
from harness.download.record import load_record, save_record, sole_download
from harness.download.transfer import Notify
from harness.errors import HarnessError

NAME = "openimages"

# the addresses of MLPerf Inference's openimages.py; the bucket is that of its boto3 calls
_TABLES = "https://storage.googleapis.com/openimages/v5"
BOXES = Remote(f"{_TABLES}/validation-annotations-bbox.csv")
CLASSES = Remote(f"{_TABLES}/class-descriptions-boxable.csv")
_SERVER = "https://open-images-dataset.s3.amazonaws.com"

_VAL_IMAGES = 24_781
"""Images of the validation split with a box of the benchmark's classes, before they are known."""
_IMAGE_SIZE = 310_000
"""Bytes of an image on average: 12 GB over the validation split's 41,620 images, and 513 GB over
the training split's 1,743,042 (https://github.com/cvdfoundation/open-images-dataset)."""
_TEXT_SIZE = 150_000_000
"""Bytes of both CSV files and the annotations: an estimate, 300,000 boxes of 90 and 350 bytes."""

_OTHERWISE = "they are in the bucket s3://open-images-dataset, in validation/ and train/"


def download_openimages(build_dir: Path, mirror: str | None, notify: Notify) -> tuple[Fetched, ...]:
    """Put Open Images' validation and calibration images in place, and make the annotations.

    Validation is every image with a box of the benchmark's classes. The annotations are made once
    all of them are there, and the map is made of the annotations, also of those that were put there
    by hand. Parameters, result and errors are those of `harness.download.download.download_data`.
    """
    val = known_dataset(NAME, "val", build_dir)
    cal = known_dataset(NAME, "cal", build_dir)
    folder = val.map_file.parent
    annotations = folder / "annotations" / "openimages-mlperf.json"
    classes = (SHIPPED / MAPS / NAME / "classes.txt").read_text(encoding="utf-8").splitlines()
    with sole_download(folder):
        job = Job(folder, load_record(folder), mirror, notify)
        new = absent(job, [str(annotations.relative_to(folder))])
        calibration = _urls(job, "calibration/data", "train", load_map(cal.map_file))
        boxes: list[Box] = []
        if new:
            there = sum(1 for _ in val.image_dir.glob("*.jpg"))
            images = len(calibration) + max(0, _VAL_IMAGES - there)
            require_space(folder, _TEXT_SIZE + _IMAGE_SIZE * images)
            boxes = _fetch_boxes(job, classes)
            names = [f"{image}.jpg" for image in dict.fromkeys(box.image for box in boxes)]
        else:
            names = _annotated(annotations)
        validation = _urls(job, "validation/data", "validation", names)
        require_space(folder, _IMAGE_SIZE * (len(validation) + len(calibration)))
        fetch_images(job, validation, val.image_dir, _OTHERWISE)
        fetch_images(job, calibration, cal.image_dir, _OTHERWISE)
        if new:
            content = coco_annotations(boxes, classes, _sizes(val.image_dir, names))
            names = [image["file_name"] for image in content["images"]]
            text = json.dumps(content).encode()
            write_atomically(annotations, text)
            job.record[new[0]] = sha256(text).hexdigest()
            save_record(folder, job.record)
        if len(names) != _VAL_IMAGES:
            notify(
                f"{annotations} has {len(names)} images, the benchmark {_VAL_IMAGES}: what is "
                "measured on them is not its mAP"
            )
        write_atomically(val.map_file, "".join(f"{name}\n" for name in names).encode())
    return (
        Fetched(annotations, 1, len(new)),
        Fetched(val.image_dir, len(names), len(validation)),
        Fetched(cal.image_dir, len(load_map(cal.map_file)), len(calibration)),
    )


def _urls(job: Job, place: str, split: str, names: Sequence[str]) -> dict[str, str]:
    """Address of each image that is not there, by its name in the job's folder."""
    missing = absent(job, [f"{place}/{name}" for name in names])
    return {name: f"{_SERVER}/{split}/{quote(name.removeprefix(f'{place}/'))}" for name in missing}


def _fetch_boxes(job: Job, classes: Sequence[str]) -> list[Box]:
    paths = []
    for table in (BOXES, CLASSES):
        name = f"annotations/{table.name}"
        if absent(job, [name]):
            fetch_file(job, table, name)
        paths.append(job.folder / name)
    return read_boxes(paths[0], paths[1], classes)


def _annotated(annotations: Path) -> list[str]:
    """Names of the images of an annotation file, in its order."""
    try:
        names = [image["file_name"] for image in load_annotations(annotations)["images"]]
    except EngineError as error:
        raise HarnessError(f"{error}; move it away to have it made again") from error
    for name in names:
        check_image_name(name, str(annotations))
    return names


def _sizes(folder: Path, names: Sequence[str]) -> Mapping[str, tuple[int, int]]:
    """Height and width of each image, by its ImageID."""
    sizes: dict[str, tuple[int, int]] = {}
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        progress_bar("sizes of the images") as bar,
    ):
        found = pool.map(_size, [folder / name for name in names])
        for name, size in zip(names, found, strict=True):
            sizes[name.removesuffix(".jpg")] = size
            if bar is not None:
                bar(len(sizes), len(names))
    return sizes


def _size(path: Path) -> tuple[int, int]:
    """Height and width as MLPerf's script has them, and preprocessing: turned as EXIF data asks."""
    import cv2

    image = cv2.imread(str(path))
    if image is None:
        raise HarnessError(f"{path} cannot be decoded; move it away to download it again")
    return image.shape[0], image.shape[1]

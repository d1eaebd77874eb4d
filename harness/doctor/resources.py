"""Disk and memory: what the route needs, and what this machine has."""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_MEGA, _GIBI = 10**6, 2**30

_FP32_IMAGE = 3 * 1200 * 1200 * 4
_INT8_IMAGE = 3 * 1200 * 1200
_DEMO_IMAGE = 3 * 400 * 400 * 4
_FP32_800 = 3 * 800 * 800 * 4
_INT8_800 = 3 * 800 * 800


@dataclass(frozen=True)
class Need:
    """Something that takes disk or memory.

    Attributes
    ----------
    what
        The step, for people.
    kind
        ``disk``, in the build folder, or ``memory``.
    size
        Bytes.
    source
        Where the figure comes from.
    folders
        Folders below the build folder, as glob patterns, that it fills.
    optional
        The benchmark is run without it.
    dataset
        Of the benchmark that it is for; None: of all, or of the demo.
    """

    what: str
    kind: Literal["disk", "memory"]
    size: int
    source: str
    folders: tuple[str, ...] = ()
    optional: bool = False
    dataset: str | None = None


NEEDS = (
    Need(
        "demo, both sets preprocessed",
        "disk",
        184 * _DEMO_IMAGE + 45 * _MEGA,
        "184 FP32 images of 1.92 MB (3·400·400·4 bytes), four models of 11 MB",
        ("preprocessed_data/*demo*", "onnx/*demo*"),
    ),
    Need(
        "COCO: val2017, its annotations, 500 calibration images",
        "disk",
        920 * _MEGA,
        "815 MB, 20 MB, and 500 of the 118,287 images in train2017's 18 GB; while it is unpacked, "
        "1.1 GB of archives besides",
        ("data/coco",),
        dataset="coco",
    ),
    Need(
        "weights and models of ssd-resnet34",
        "disk",
        400 * _MEGA,
        "80 MB of weights (zenodo 3236545), and as much for each of four .onnx files",
        ("models/ssd-resnet34", "onnx/ssd-resnet34.*"),
        dataset="coco",
    ),
    Need(
        "COCO calibration set, FP32",
        "disk",
        500 * _FP32_IMAGE,
        "500 images of 17.28 MB (3·1200·1200·4 bytes)",
        ("preprocessed_data/coco-cal",),
        dataset="coco",
    ),
    Need(
        "COCO validation set, INT8",
        "disk",
        5000 * _INT8_IMAGE,
        "5000 images of 4.32 MB (3·1200·1200 bytes)",
        ("preprocessed_data/coco-val/int8*",),
        dataset="coco",
    ),
    Need(
        "COCO validation set, FP32 (only to run or compare the float model)",
        "disk",
        5000 * _FP32_IMAGE,
        "5000 images of 17.28 MB (3·1200·1200·4 bytes)",
        ("preprocessed_data/coco-val/float32*",),
        optional=True,
        dataset="coco",
    ),
    Need(
        "Open Images: validation images of retinanet, its annotations, 500 calibration images",
        "disk",
        7_990 * _MEGA,
        "24,781 and 500 images of 310 kB, as of the validation split's 41,620 in 12 GB; 150 MB of "
        "CSV files and annotations, an estimate",
        ("data/openimages",),
        dataset="openimages",
    ),
    Need(
        "weights and models of retinanet",
        "disk",
        750 * _MEGA,
        "149 MB of weights (37,197,100 in float32), and as much for each of four .onnx files",
        ("models/retinanet", "onnx/retinanet.*"),
        dataset="openimages",
    ),
    Need(
        "Open Images calibration set, FP32",
        "disk",
        500 * _FP32_800,
        "500 images of 7.68 MB (3·800·800·4 bytes)",
        ("preprocessed_data/openimages-cal",),
        dataset="openimages",
    ),
    Need(
        "Open Images validation set, INT8",
        "disk",
        24_781 * _INT8_800,
        "24,781 images of 1.92 MB (3·800·800 bytes)",
        ("preprocessed_data/openimages-val/int8*",),
        dataset="openimages",
    ),
    Need(
        "Open Images validation set, FP32 (only to run or compare the float model)",
        "disk",
        24_781 * _FP32_800,
        "24,781 images of 7.68 MB (3·800·800·4 bytes)",
        ("preprocessed_data/openimages-val/float32*",),
        optional=True,
        dataset="openimages",
    ),
    Need(
        "export-onnx at 1200x1200",
        "memory",
        round(1.4 * _GIBI),
        "peak measured on two cores",
    ),
    Need(
        "engine calibrate at 1200x1200",
        "memory",
        round(1.95 * _GIBI),
        "peak measured on two cores (docs/measurements/calibration_memory.json)",
    ),
    Need(
        "harness run, samples of the INT8 model",
        "memory",
        64 * _INT8_IMAGE,
        "64 performance samples of 4.32 MB; the engine comes on top",
    ),
    Need(
        "harness run, samples of the FP32 model",
        "memory",
        64 * _FP32_IMAGE,
        "64 performance samples of 17.28 MB; the engine comes on top",
    ),
)
"""What the steps of the README take, in its order, for one benchmark after the other."""


@dataclass(frozen=True)
class Balance:
    """A need, held against the machine.

    Attributes
    ----------
    need
        What is needed.
    there
        Bytes of it that are on disk already.
    enough
        Memory: whether it is available. Disk: whether there is room for the rest of this need and
        of those before it for the same data set, and for the demo.
    """

    need: Need
    there: int
    enough: bool


@dataclass(frozen=True)
class Resources:
    """What this machine has; sizes in bytes, None where the system does not tell.

    Attributes
    ----------
    folder
        The build folder, absolute.
    writable
        Whether files can be made there.
    disk_free
        For this user, on the file system of `folder`.
    memory_total, memory_available
        Of the machine, or of the container that limits it.
    balance
        One for each of `NEEDS`.
    """

    folder: str
    writable: bool
    disk_free: int | None
    memory_total: int | None
    memory_available: int | None
    balance: tuple[Balance, ...]


def find_resources(build_dir: Path) -> Resources:
    """Hold free disk and memory against `NEEDS`; the build folder need not exist."""
    folder = build_dir.absolute()
    parents = (place for place in (folder, *folder.parents) if os.access(place, os.F_OK))
    existing = next(parents, folder)
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        free = None
    total, available = _memory()
    balance, disk = [], Counter[str | None]()
    for need in NEEDS:
        paths = {path for pattern in need.folders for path in folder.glob(pattern)}
        there = sum(_size(path) for path in paths if not path.is_symlink())  # to another of them
        takes, has = need.size, available
        if need.kind == "disk":
            disk[need.dataset] += max(0, need.size - there)
            takes = disk[need.dataset] + (disk[None] if need.dataset else 0)
            has = free
        balance.append(Balance(need, there, has is None or takes <= has))
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Resources(str(folder), writable, free, total, available, tuple(balance))


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes, the smaller of the machine's and the container's."""
    total, available = _meminfo("MemTotal"), _meminfo("MemAvailable")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max": no limit
        return total, available
    return (
        limit if total is None else min(total, limit),
        limit - used if available is None else min(available, limit - used),
    )


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        return None


def _size(path: Path) -> int:
    """Bytes of a file, or of the files below a folder; what cannot be read counts as nothing."""
    below = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(map(_file_size, (path, *below)))


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0

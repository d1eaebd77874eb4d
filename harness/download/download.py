"""The benchmarks' data and models: where they come from, where they go, and that they are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from engine.data.coco import load_annotations
from harness.benchmarks import Description
from harness.data.dataset import known_dataset, load_map
from harness.download.coco import download_coco
from harness.download.files import Fetched, Job, absent, fetch_file
from harness.download.openimages import download_openimages
from harness.download.record import load_record, sole_download
from harness.download.transfer import Notify
from harness.errors import HarnessError

_DATA: Mapping[str, Callable[[Path, str | None, Notify], tuple[Fetched, ...]]] = {
    "coco": download_coco,
    "openimages": download_openimages,
}
"""By the name of the data set."""


def download_data(
    benchmark: Description, build_dir: Path, mirror: str | None, notify: Notify
) -> tuple[Fetched, ...]:
    """Put a benchmark's images and annotations in place.

    Parameters
    ----------
    benchmark
        One whose data are not shipped.
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
    return _DATA[benchmark.dataset](build_dir, mirror, notify)


def download_models(
    benchmark: Description, build_dir: Path, mirror: str | None, notify: Notify
) -> tuple[Fetched, ...]:
    """Put a benchmark's checkpoint and its official ONNX export in place.

    Parameters, result and errors are those of `download_data`.
    """
    folder = build_dir / benchmark.weights.parent
    done = []
    with sole_download(folder):
        job = Job(folder, load_record(folder), mirror, notify)
        for model in benchmark.models:
            missing = absent(job, [model.name], model)
            if missing:
                fetch_file(job, model)
            done.append(Fetched(folder / model.name, 1, len(missing)))
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

"""Detections on any pictures: drawn on them, and as COCO results."""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import one_line
from engine.manifest import Manifest
from engine.model import Detector
from engine.protocol import Engine
from engine.support.documents import parse_json
from engine.support.files import another, write_output
from engine.support.progress import Progress
from graph_surgery.names import NAMES_KEY, names_from_json, read_names
from harness.data.transform import BadImageError, decode, read_image, transform
from harness.errors import HarnessError
from harness.results.pictures import draw_rows, enlarged, to_jpeg

BATCH = 8
"""Images of a batch, where the engine takes as many."""

PREDICTIONS = "predictions.json"

_SUFFIXES = {
    *(".avif", ".bmp", ".dib", ".exr", ".hdr", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".pic", ".png", ".pnm", ".ppm", ".ras", ".sr", ".tif", ".tiff", ".webp"),
}
"""What counts as a picture in a folder; a file that is named is one whatever it is called."""


@dataclass(frozen=True)
class Prediction:
    """What was found on an image.

    Attributes
    ----------
    image
        The file.
    number
        Its position among the images that were given, from 1.
    size
        Its width and height in pixels, turned as its EXIF orientation says.
    rows
        float32 [R, 7]: see `engine.protocol.Session.result`; descending score.
    names
        Name of the label of each row.
    picture
        The file with its boxes.
    """

    image: Path
    number: int
    size: tuple[int, int]
    rows: NDArray[np.float32]
    names: tuple[str, ...]
    picture: Path


def find_images(places: Sequence[str]) -> tuple[Path, ...]:
    """Files of images, each once: what is named, what folders hold at any depth, what globs match.

    Raises
    ------
    HarnessError
        When one of these places has none.
    """
    found: dict[Path, None] = {}
    for place in places:
        paths = [place]
        if not Path(place).exists():
            paths = sorted(glob.glob(place, recursive=True))  # noqa: PTH207 - absolute ones, too
        files = [file for path in paths for file in _images_of(Path(path))]
        if not files:
            above = Path(place).parent
            beside = _beside(above) if above.name and above.is_dir() else None
            hint = f"; in {above} are some, as {beside}: name {above}" if beside else ""
            raise HarnessError(
                f"{place}: no such image, nor a folder or pattern that has some{hint}"
            )
        found |= dict.fromkeys(files)
    return tuple(found)


def _beside(folder: Path) -> Path | None:
    """One of the images of a folder, not of those in it, which may be a disk."""
    return next((file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES), None)


def _images_of(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()
    )


def class_names(known: Detector | Manifest, file: Path | None) -> dict[int, str]:
    """Names of a model's labels: a file's, else those in its metadata, else none.

    Raises
    ------
    SurgeryError
        When the file cannot be read, or the metadata is no list of names.
    """
    if file is not None:
        names = read_names(file)
        if names and names[0].strip("_").lower() == "background":
            del names[0]
    else:
        text = known.metadata.get(NAMES_KEY)
        names = [] if text is None else names_from_json(text)
    return dict(enumerate(names, known.first_label))


def predict(
    engine: Engine,
    images: Sequence[Path],
    names: Mapping[int, str],
    output: Path,
    *,
    score: float,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Prediction], dict[Path, str]]:
    """Detect objects on images; write a picture of each, and `PREDICTIONS`.

    Parameters
    ----------
    images
        Files of images, each once.
    names
        Name of each label; empty: they are called by their numbers.
    output
        Folder, made when it is not there.
    score
        Detections below are left out.
    overwrite
        Whether other files there may be replaced.
    progress
        Called after each batch.

    Returns
    -------
    What was found, and why the images that are not among it could not be used.

    Raises
    ------
    HarnessError
        When a file would be written over an image, or a label has no name.
    EngineError
        When the engine fails, or a file cannot be written. That `PREDICTIONS` is of other images is
        told before anything runs, that it or a picture of these is another, after.
    """
    import cv2

    pictures = _pictures(images, output)
    if not overwrite:
        _check_predictions(output / PREDICTIONS, images)
    with contextlib.suppress(OSError):  # write_output tells
        output.mkdir(parents=True, exist_ok=True)
    found: list[Prediction] = []
    bad: dict[Path, str] = {}
    size = min(BATCH, engine.max_batch or BATCH)
    batch = engine.host_array((size, *engine.input_spec.shape), engine.input_spec.dtype)
    with contextlib.closing(engine.session()) as session:
        for start in range(0, len(images), size):
            loaded: list[tuple[int, NDArray[np.uint8]]] = []
            for number, image in enumerate(images[start : start + size], start):
                try:
                    pixels = decode(read_image(image)[0])
                    transform(pixels, engine.input_spec, batch[len(loaded)])
                except BadImageError as error:
                    bad[image] = str(error)
                except (cv2.error, MemoryError) as error:
                    bad[image] = f"too large: {one_line(error)}"
                else:
                    loaded.append((number, pixels))
            if loaded:
                detections, counts = session.infer(batch[: len(loaded)])
                for (number, pixels), rows, valid in zip(loaded, detections, counts, strict=True):
                    kept = rows[:valid][rows[:valid, 5] >= score]
                    picture = enlarged(pixels)
                    labels = kept[:, 6].astype(int).tolist()
                    called = names or {label: f"label {label}" for label in labels}
                    draw_rows(picture, kept, called)
                    write_output(pictures[number], to_jpeg(picture), overwrite=overwrite)
                    height, width = pixels.shape[:2]
                    kinds = tuple(called[label] for label in labels)
                    one = images[number], number + 1, (width, height), kept, kinds
                    found.append(Prediction(*one, pictures[number]))
            if progress is not None:
                progress(min(start + size, len(images)), len(images))
    results = [result for one in found for result in _coco_results(one)]
    text = json.dumps(results, indent=1) + "\n"
    write_output(output / PREDICTIONS, text.encode(), overwrite=overwrite)
    return found, bad


def _pictures(images: Sequence[Path], output: Path) -> list[Path]:
    """Where the picture of each image is written: ``a.jpg``, of the next of its name ``a-2.jpg``.

    Raises
    ------
    HarnessError
        When an image lies there.
    """
    taken: set[str] = {PREDICTIONS}
    pictures = []
    for image in images:
        names = (f"{image.stem}{end}.jpg" for end in chain([""], (f"-{n}" for n in count(2))))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        pictures.append(output / name)
    read = {image.resolve() for image in images}
    if over := next((path for path in pictures if path.resolve() in read), None):
        raise HarnessError(f"{over} is an image itself; give another folder with -o")
    return pictures


def _check_predictions(path: Path, images: Sequence[Path]) -> None:
    """Refuse a file of the name that is none of these images, before the work.

    Raises
    ------
    EngineError
        Says so.
    """
    if not path.exists():
        return
    ours = {(number, str(image)) for number, image in enumerate(images, start=1)}
    try:
        known = parse_json(path.read_bytes())
        same = ours.issuperset((one["image_id"], one["file_name"]) for one in known)
    except (OSError, ValueError, TypeError, KeyError):
        same = False
    if not same:
        raise another(path)


def _coco_results(found: Prediction) -> Iterator[dict[str, object]]:
    """Entries of COCO's results (https://cocodataset.org/#format-results), and names for people."""
    width, height = found.size
    for row, name in zip(found.rows.tolist(), found.names, strict=True):
        _, ymin, xmin, ymax, xmax, score, label = row
        yield {
            "image_id": found.number,
            "category_id": int(label),
            "bbox": [xmin * width, ymin * height, (xmax - xmin) * width, (ymax - ymin) * height],
            "score": score,
            "file_name": str(found.image),
            "category_name": name,
        }

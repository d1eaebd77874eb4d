"""Preprocessed sets: a folder of .npy images with a manifest, made by `harness preprocess`.

A set is never written again: what is made later is another folder, and the name under which a set
is opened a link to the newest. Who has opened one holds a shared lock on its manifest, so that it
stays as long as it is read, and an image that was replaced all the same is refused.

The manifest's image list is the truth about sample indices. A bad image that the user chose to
skip is not in it, so later images have a lower index than their line in the map: look images up
by name through ``PreprocessedSet.files``, never by position in the map.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.data.npy import npy_path, npy_time, read_npy
from engine.errors import EngineError
from engine.protocol import InputSpec
from engine.support.documents import checked, read_json

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
"""Stands in the `unfinished` folder instead of the manifest."""

MEAN = (0.485, 0.456, 0.406)
"""RGB mean of the ImageNet normalisation, for values in [0, 1] (MLPerf reference dataset.py)."""
STD = (0.229, 0.224, 0.225)
"""RGB standard deviation that goes with `MEAN`."""
PIXEL_RANGE = max(max(mean, 1 - mean) / std for mean, std in zip(MEAN, STD, strict=True))
"""Largest magnitude that a pixel, 0 to 255, has once normalised; resizing stays within."""
INTERPOLATION = "bilinear on float32"


@dataclass(frozen=True)
class ImageEntry:
    """An image of a set, and what its source was: see `harness.data.transform.Source`."""

    file: str
    size: int
    mtime_ns: int
    sha256: str | None = None  # the first sets did not say
    shape: tuple[int, int] | None = None  # nor this


@dataclass(frozen=True)
class BadImage:
    """An image that is not in a set, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class SetManifest:
    """Content of a set's manifest.

    Attributes
    ----------
    dataset, map_sha256
        What was preprocessed.
    format, image_size, dtype, scale, mean, std, interpolation
        See `transform_settings`.
    opencv, code_sha256
        What made the images; None: it does not say.
    images, bad
        Those of the map, in its order.
    """

    dataset: str
    map_sha256: str
    format: int
    image_size: tuple[int, int]
    dtype: Literal["float32", "int8"]
    scale: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    images: list[ImageEntry]
    bad: list[BadImage]
    opencv: str | None = None
    code_sha256: str | None = None


@dataclass(frozen=True)
class PreprocessedSet:
    """A complete set of preprocessed images.

    Attributes
    ----------
    directory
        Folder of the .npy files and the manifest.
    files
        Image file names; the position is the sample index.
    spec
        The input that the images were made for.
    manifest
        Content of the manifest file, a `SetManifest`.
    times
        When the file of each image was written, in ns, as it was first seen.
    held
        What keeps the set from being removed, as long as it exists.
    """

    directory: Path
    files: tuple[str, ...]
    spec: InputSpec
    manifest: Mapping[str, Any]
    times: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    held: object = field(default=None, compare=False, repr=False)

    def load(self, indices: Sequence[int]) -> NDArray[np.generic]:
        """Read images.

        Parameters
        ----------
        indices
            Sample indices, 0 <= index < len(files).

        Returns
        -------
        ndarray
            [len(indices), channels, height, width] of the spec's dtype, C-contiguous.

        Raises
        ------
        EngineError
            A file is missing, cut short, holds another shape or dtype, or was written since it was
            first seen.
        """
        batch = np.empty((len(indices), *self.spec.shape), self.spec.dtype)
        self.read_into(batch, indices)
        return batch

    def read_into(self, batch: NDArray[np.generic], indices: Sequence[int]) -> None:
        """Read images, as `load`, into memory that is there: C-contiguous, of that shape."""
        for image, index in zip(batch, indices, strict=True):
            name = self.files[index]
            path = npy_path(self.directory, name)
            try:
                written = read_npy(path, self.spec, image)
            except OSError as error:
                raise EngineError(f"{path} cannot be read: {error.strerror}") from error
            if written is None:
                raise EngineError(
                    f"{path} is damaged or holds no {self.spec.dtype} {list(self.spec.shape)}; "
                    f"run {preprocess_command(str(self.manifest.get('dataset')))} again"
                )
            if self.times.setdefault(name, written) != written:
                raise EngineError(
                    f"{path} was written since this command opened the set; run it again when "
                    "nothing writes there"
                )


def unfinished(directory: Path) -> Path:
    """Where a set lies until it is complete and gets a name of its own."""
    return directory.with_name(f"{directory.name}.partial")


def preprocess_command(dataset: str) -> str:
    """Command, in backquotes, that makes a set of a data set's split, ``<data set>-<split>``."""
    name, _, split = dataset.rpartition("-")
    chosen = f"{name} --{split}_only" if split in ("val", "cal") else "NAME"
    return f"`harness preprocess MODEL --dataset {chosen}`"


def load_preprocessed(
    directory: Path, spec: InputSpec, dataset: str = "", *, split: str = ""
) -> PreprocessedSet:
    """Open a set that `harness preprocess` made, and check it against an engine's input.

    Parameters
    ----------
    directory
        Folder of the set, or a link to it.
    spec
        The engine's input.
    dataset
        Name of the data set's split that should be there, for messages; empty: unknown.
    split
        Which split of any data set is to be made where this one does not do; empty: the same.

    Returns
    -------
    PreprocessedSet
        The set, which stays as it is while this object exists.

    Raises
    ------
    EngineError
        No complete set in `directory`; image size, dtype, scale or normalisation differ (names
        both values); .npy files missing or of the wrong size.
    """
    wanted = transform_settings(spec)
    place = directory.resolve() if directory.is_symlink() else directory  # the link may move
    path = place / MANIFEST
    try:
        held = _hold(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise EngineError(f"{path} cannot be read: {error.strerror}") from error
        begun = (unfinished(directory) / JOURNAL).exists()
        state = "is unfinished" if begun else "holds no preprocessed images"
        command = preprocess_command(dataset or (f"NAME-{split}" if split else ""))
        near = _sets_near(directory)
        hint = f"; there are sets in {', '.join(near)}" if near else ""
        raise EngineError(f"{directory} {state}; run {command} first{hint}") from None
    remedy = "it is damaged; run `harness preprocess` again"
    manifest = read_json(path, remedy)
    found = checked(SetManifest, manifest, f"{path}: ", remedy)
    name = f"{found.dataset.rpartition('-')[0]}-{split}" if split else found.dataset
    command = preprocess_command(name)
    if spec.dtype == "float32" and name.endswith("-val"):  # those of an INT8 MODEL are INT8
        command = command.removesuffix("`") + " --formats fp32`"
    for key, value in wanted.items():
        if manifest.get(key) != value:
            raise EngineError(
                f"{directory} was preprocessed with {key} {manifest.get(key)}, the engine takes "
                f"{value}; run {command}"
            )
    names = tuple(entry.file for entry in found.images)
    times = {name: npy_time(npy_path(place, name), spec) for name in names}
    whole = {name: written for name, written in times.items() if written is not None}
    broken = [name for name in names if name not in whole]
    if broken:
        raise EngineError(
            f"{directory}: {len(broken)} of {len(names)} preprocessed files are missing or have a "
            f"wrong size, the first is {broken[0]}.npy; run {command} again"
        )
    return PreprocessedSet(place, names, spec, manifest, whole, held)


def _sets_near(directory: Path) -> list[str]:
    """Names of at most three sets in a folder or beside it, those of links where there are some."""
    places = {
        path.parent
        for folder in (directory, directory.parent)
        for path in sorted(folder.glob(f"*/{MANIFEST}"))
    }
    links = {path for path in places if path.is_symlink()}
    return sorted(map(str, links or places))[:3]


class _Held:
    """Somebody reads a set."""


def _hold(path: Path) -> _Held:
    """Hold the shared lock of a set's manifest for as long as the result exists."""
    descriptor = os.open(path, os.O_RDONLY)
    held = _Held()
    weakref.finalize(held, os.close, descriptor)
    # where there is no lock to be had, the times of the files must do
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return held


def transform_settings(spec: InputSpec) -> dict[str, Any]:
    """Everything that a .npy depends on besides its source image, JSON-serialisable.

    Raises
    ------
    EngineError
        No image can be made for this spec: not three channels, an INT8 input without a positive
        scale, a float32 input with one.
    """
    if spec.shape[0] != 3:
        raise EngineError(f"input {spec.name} takes {spec.shape[0]} channels; images have 3")
    if spec.dtype == "int8" and not (spec.scale is not None and 0 < spec.scale < np.inf):
        raise EngineError(f"INT8 input {spec.name} needs a positive scale, not {spec.scale}")
    if spec.dtype == "float32" and spec.scale is not None:
        raise EngineError(f"float32 input {spec.name} takes no scale, but has {spec.scale}")
    return {
        "format": 1,
        "image_size": list(spec.shape[1:]),
        "dtype": spec.dtype,
        # graphs store scales as float32; compare what both sides can represent
        "scale": None if spec.scale is None else float(np.float32(spec.scale)),
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": INTERPOLATION,
    }


def quantize_images(images: NDArray[np.float32], spec: InputSpec) -> NDArray[np.generic]:
    """Turn normalised images into what an input takes.

    Parameters
    ----------
    images
        float32 [..., *spec.shape].
    spec
        The input; int8: images / scale, rounded half to even, clipped to [-127, 127].
    """
    if spec.scale is None:
        return images
    steps: NDArray[np.float32] = np.clip(np.rint(images / np.float32(spec.scale)), -127, 127)
    return steps.astype(np.int8)


def preprocessing_sha256(shape: tuple[int, int, int]) -> str:
    """Hash of what normalised images of this (channels, height, width) are."""
    settings = transform_settings(InputSpec("image", shape, "float32"))
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def images_sha256(images: PreprocessedSet, count: int) -> str:
    """Hash of the names and the values of the first `count` images, in their order."""
    digest = sha256()
    for index, name in enumerate(images.files[:count]):
        hash_images(digest, [name], images.load([index]))
    return digest.hexdigest()


def hash_images(digest: Hash, names: Sequence[str], images: NDArray[np.generic]) -> None:
    """Add images, C-contiguous, to the hash of a set; see `images_sha256`."""
    for name, image in zip(names, images, strict=True):
        digest.update(f"{name}\n".encode())
        digest.update(image.data.cast("B"))


def is_flat(image: NDArray[np.float32]) -> bool:
    """Tell whether an image, float32 [3, H, W] and normalised, is one colour and little more.

    Every channel stays within 8 of the 255 levels, which are too few for the edges of an object.
    """
    spread = np.ptp(image, axis=(1, 2)) * np.array(STD, np.float32)
    return bool((spread <= 8 / 255).all())

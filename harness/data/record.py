"""What a preprocessed set is made from, as `make` and `harness preprocess` record it beside it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path

from engine.data.preprocessed import PreprocessedSet, transform_settings
from engine.protocol import InputSpec
from engine.support.files import file_sha256
from harness.artefacts import TRANSFORM_CODE, Artefact, code_sha256, recorded, version
from harness.data.dataset import Dataset


def images_artefact(data: Dataset, spec: InputSpec, directory: Path) -> Artefact:
    """The preprocessed images of a data set for an engine's input, in a directory.

    Whether the source images are still the same, the set's own manifest tells.
    """
    return Artefact(
        f"preprocess {data.name}",
        directory,
        {
            "map": file_sha256(data.map_file) if data.map_file.is_file() else "",
            "image format": sha256(json.dumps(transform_settings(spec)).encode()).hexdigest(),
            "code": code_sha256(TRANSFORM_CODE),
            "opencv": version("opencv-python-headless"),
        },
    )


def images_sha256(images: PreprocessedSet) -> str:
    """Hash of the names and contents of the sources, and of what turned them into input."""
    sources = [(entry["file"], entry["sha256"]) for entry in images.manifest["images"]]
    turned = {key: value for key, value in images.manifest.items() if key != "images"}
    return sha256(json.dumps([sources, turned, code_sha256(TRANSFORM_CODE)]).encode()).hexdigest()


def recorded_images(
    data: Dataset, spec: InputSpec, directory: Path
) -> AbstractContextManager[None]:
    """See `harness.artefacts.recorded`."""
    return recorded(images_artefact(data, spec, directory))

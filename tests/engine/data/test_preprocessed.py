"""The manifest of a preprocessed set as a format."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given

from engine.data.preprocessed import MANIFEST, MEAN, STD, SetManifest, load_preprocessed
from engine.errors import EngineError
from engine.protocol import InputSpec
from engine.support.documents import checked
from tests.support.formats import Sample, damages

SPEC = InputSpec("image", (3, 4, 5), "int8", 0.5)
SAMPLE = Sample(
    {
        "dataset": "coco-val",
        "map_sha256": "1" * 64,
        "format": 1,
        "image_size": [4, 5],
        "dtype": "int8",
        "scale": 0.5,
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bilinear on float32",
        "images": [
            {"file": "a.jpg", "size": 9, "mtime_ns": 10**18, "sha256": "2" * 64, "shape": [4, 5]}
        ],
        "bad": [{"file": "b.jpg", "reason": "is missing"}],
        "opencv": "5.0.0",
        "code_sha256": "3" * 64,
    },
    nullable=frozenset({"scale", "opencv", "code_sha256", "images[].sha256", "images[].shape"}),
    optional=frozenset({"opencv", "code_sha256", "images[].sha256", "images[].shape"}),
)


def write(folder, document):
    (folder / MANIFEST).write_text(json.dumps(document))
    np.save(folder / "a.jpg.npy", np.zeros(SPEC.shape, np.int8))


def test_a_manifest_comes_back():
    found = checked(SetManifest, SAMPLE.document, "")
    assert json.loads(json.dumps(asdict(found))) == SAMPLE.document


@given(damages(SAMPLE))
def test_damage_is_named_by_its_path(tmp_path_factory, damage):
    folder = tmp_path_factory.getbasetemp()
    write(folder, damage.document)
    with pytest.raises(EngineError) as caught:
        load_preprocessed(folder, SPEC)
    assert str(caught.value).startswith(f"{folder / MANIFEST}: {damage.says}")
    assert str(caught.value).endswith("; it is damaged; run `harness preprocess` again")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"format": 1, "format": 1}', "stands twice"), ("[" * 100_000, "in each other")],
)
def test_what_is_no_document(tmp_path, text, message):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(EngineError, match=rf"manifest\.json: .*{message}.*; it is damaged"):
        load_preprocessed(tmp_path, SPEC)


def test_the_first_sets_are_still_read(tmp_path):
    """Which said neither what code nor what content an image was made from."""
    document = {key: value for key, value in SAMPLE.document.items() if key != "code_sha256"}
    document["images"] = [{"file": "a.jpg", "size": 9, "mtime_ns": 10**18}]
    write(tmp_path, document)
    found = load_preprocessed(tmp_path, SPEC)
    assert found.files == ("a.jpg",)
    assert found.manifest == document

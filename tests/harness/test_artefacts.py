"""The records of artefacts: one that is damaged counts as none."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.artefacts import Artefact, make, stale
from tests.support.formats import Sample, damages

UNKNOWN = "nothing tells what it was made from"


def made(folder, inputs=None):
    """A current artefact, and the file that says what it was made from."""
    artefact = Artefact("step", folder / "model.bin", inputs or {"ONNX": "1", "code": "2"})
    record = artefact.path.with_name("model.bin.inputs.json")
    record.unlink(missing_ok=True)
    make(artefact, lambda: artefact.path.write_bytes(b"content"), lambda _: None)
    return artefact, record


@given(st.dictionaries(st.text(max_size=9), st.text(max_size=9), min_size=1, max_size=4))
def test_a_record_comes_back(tmp_path_factory, inputs):
    assert stale(made(tmp_path_factory.getbasetemp(), inputs)[0]) is None


@given(st.data())
def test_a_damaged_record_is_none(tmp_path_factory, data):
    artefact, record = made(tmp_path_factory.getbasetemp())
    sample = Sample(json.loads(record.read_bytes()), maps=frozenset({"inputs"}))
    record.write_text(json.dumps(data.draw(damages(sample)).document))
    assert stale(artefact) == UNKNOWN


@pytest.mark.parametrize("text", ["", "[]", '{"inputs": {}, "inputs": {}}', "[" * 100_000])
def test_what_is_no_document(tmp_path, text):
    artefact, record = made(tmp_path)
    record.write_text(text)
    assert stale(artefact) == UNKNOWN


def test_data_beside_a_model_is_part_of_it(tmp_path):
    path, data = tmp_path / "model.onnx", tmp_path / "w.bin"
    tensor = onnx.numpy_helper.from_array(np.zeros(999, np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])

    def build():
        model = onnx.helper.make_model(graph)
        onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)

    artefact = Artefact("step", path, {"weights": "1"})
    make(artefact, build, lambda _: None)
    assert stale(artefact) is None
    data.write_bytes(b"1" + data.read_bytes()[1:])
    assert stale(artefact) == "it was changed after it was made"
    data.unlink()
    assert stale(artefact) == "it was changed after it was made"
    make(artefact, build, lambda _: None)
    assert stale(artefact) is None

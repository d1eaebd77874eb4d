"""The manifest of an engine file as a format: what is read, refused, and said by older ones."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.triton.served import served_model
from engine.errors import EngineError
from engine.manifest import Manifest, PluginLibrary, load_manifest, manifest_path, save_engine
from engine.protocol import InputSpec, output_shapes
from graph_surgery.replace import insert_nms
from tests.support.formats import JSON, Sample, damages
from tests.support.graphs import UNCAPPED, detector
from tests.support.manifests import PLAN, manifest
from tests.support.writers import fail_to_write

FINITE = st.floats(allow_nan=False, allow_infinity=False)
WHOLE = st.integers(-(2**63), 2**64 - 1)
SIZE = st.integers(1, 2**31 - 1)
INPUT = st.one_of(
    st.builds(InputSpec, st.text(max_size=9), st.tuples(SIZE, SIZE, SIZE), st.just("float32")),
    st.builds(
        InputSpec,
        st.text(max_size=9),
        st.tuples(SIZE, SIZE, SIZE),
        st.just("int8"),
        st.floats(0, exclude_min=True, allow_infinity=False),
    ),
)
NAMES = st.text(max_size=9)

SAMPLE = Sample(
    {
        "backend": "tensorrt",
        "version": "10.16.1.11",
        "gpu": "NVIDIA H100 80GB HBM3",
        "compute_capabilities": ["9.0"],
        "model": "model.onnx",
        "onnx_sha256": "1" * 64,
        "plugins": [{"path": "../libnms.so", "sha256": "2" * 64, "headers": "10.14.1"}],
        "metadata": {"input_scale": "0.02"},
        "engine_sha256": "3" * 64,
        "engine_bytes": 28,
        "input": {"name": "image", "shape": [3, 400, 400], "dtype": "int8", "scale": 0.02},
        "min_batch": 1,
        "opt_batch": 8,
        "max_batch": 16,
        "options": {"tf32": True},
        "seconds": 1.5,
        "keep_top_k": 100,
        "outputs": {"detections": [100, 7], "num_detections": []},
    },
    maps=frozenset({"metadata", "options", "outputs"}),
    anything=frozenset({"options"}),
    nullable=frozenset({"gpu", "input.scale", "plugins[].headers", "outputs.detections[]"}),
    optional=frozenset({"keep_top_k", "outputs", "input.scale", "plugins[].headers"}),
)


def written(folder: Path, document: object) -> Path:
    engine = folder / "m.engine"
    engine.write_bytes(b"a plan")
    manifest_path(engine).write_text(json.dumps(document))
    return engine


@given(
    st.builds(
        Manifest,
        plugins=st.lists(st.builds(PluginLibrary, NAMES, NAMES, st.none() | NAMES), max_size=2).map(
            tuple
        ),
        metadata=st.dictionaries(NAMES, NAMES, max_size=3),
        engine_bytes=WHOLE,
        input=INPUT,
        min_batch=st.just(1),
        opt_batch=st.integers(1, 64),
        max_batch=st.integers(64, 2**31 - 1),
        options=st.dictionaries(NAMES, JSON, max_size=3),
        seconds=FINITE,
        keep_top_k=SIZE,
        outputs=st.dictionaries(NAMES, st.lists(st.none() | WHOLE, max_size=3), max_size=2),
    )
)
def test_a_manifest_comes_back(tmp_path_factory, written):
    engine = tmp_path_factory.getbasetemp() / "any.engine"
    save_engine(engine, b"a plan", written)
    assert load_manifest(engine) == written


@given(damages(SAMPLE))
def test_damage_is_named_by_its_path(tmp_path_factory, damage):
    engine = written(tmp_path_factory.getbasetemp(), damage.document)
    with pytest.raises(EngineError) as caught:
        load_manifest(engine)
    assert str(caught.value).startswith(f"{manifest_path(engine)}: {damage.says}")
    assert str(caught.value).endswith("; build it again with 'engine build --force'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"backend": "a", "backend": "b"}', "stands twice"),
        ("[" * 100_000, "in each other"),
        ("[]", "an object expected"),
        ("{", "not JSON"),
    ],
)
def test_what_is_no_document(tmp_path, text, message):
    engine = written(tmp_path, {})
    manifest_path(engine).write_text(text)
    with pytest.raises(EngineError, match=rf"m\.engine\.json: .*{message}.*; build it again"):
        load_manifest(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"input": {"shape": [3, -1, 400]}},
        {"input": {"shape": [3, 2**40, 400]}},
        {"input": {"scale": None}},
        {"input": {"scale": 0.0}},
        {"input": {"dtype": "float32"}},
        {"max_batch": 0},
        {"min_batch": 9},
        {"keep_top_k": 0},
        {"first_label": 2},
    ],
    ids=str,
)
def test_sizes_that_no_engine_has(tmp_path, changes):
    document = SAMPLE.document | changes
    if "input" in changes:
        document["input"] = SAMPLE.document["input"] | changes["input"]
    with pytest.raises(EngineError, match=r"m\.engine\.json: no engine has .*; build it again"):
        load_manifest(written(tmp_path, document))


def test_a_manifest_from_before_says_200_detections(tmp_path):
    """It has neither keep_top_k nor outputs, and the first had no headers of a plug-in."""
    document = {k: v for k, v in SAMPLE.document.items() if k not in ("keep_top_k", "outputs")}
    document["plugins"] = [{"path": "../libnms.so", "sha256": "2" * 64}]
    engine = written(tmp_path, document)
    manifest = load_manifest(engine)
    assert (manifest.keep_top_k, manifest.first_label) == (200, 1)
    assert manifest.outputs == {"detections": [200, 7], "num_detections": []}
    assert manifest.plugins[0].headers is None
    assert served_model(engine).keep_top_k == 200
    assert served_model(written(tmp_path, SAMPLE.document)).keep_top_k == 100


@pytest.mark.parametrize("said", [{}, {"correction": "bias"}, {"equalised_on": "64"}])
def test_what_triton_serves_tells_of_corrections(tmp_path, said):
    """A plan as its manifest has it, an ONNX file by itself."""
    save_engine(tmp_path / "m.engine", PLAN, manifest(metadata={"a": "x", **said}))
    model = insert_nms(detector(UNCAPPED)).model
    onnx.helper.set_model_props(model, {"a": "x", **said})
    onnx.save(model, tmp_path / "m.onnx")
    for name in ("m.engine", "m.onnx"):
        assert served_model(tmp_path / name).corrections == said


def write_large(path, size):
    save_engine(path, b"another plan", manifest(metadata={"a": "x" * size}))


def test_a_manifest_that_cannot_be_written_leaves_the_old_engine(tmp_path, capfd):
    engine = tmp_path / "m.engine"
    save_engine(engine, PLAN, manifest())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    said = fail_to_write(write_large, engine, capfd)
    assert said == f"EngineError: {engine}: cannot write it: File too large"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_input_and_outputs_as_json_has_them():
    spec = InputSpec("image", (3, 400, 300), "int8", 0.5)
    assert spec.to_dict() == SAMPLE.document["input"] | {"shape": [3, 400, 300], "scale": 0.5}
    assert output_shapes(100) == SAMPLE.document["outputs"]

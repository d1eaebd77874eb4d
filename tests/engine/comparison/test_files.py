"""`engine compare` from files: tensors between layers, and a plan's ONNX file."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from engine.comparison.files import compare_files
from engine.comparison.tensors import find_source, head_tensors, layer_tensors
from engine.errors import EngineError
from engine.manifest import Manifest
from engine.protocol import InputSpec
from graph_surgery.errors import SurgeryError
from graph_surgery.replace import insert_nms
from tests.support.exporters import write
from tests.support.graphs import nms_node
from tests.support.habits import Habits

NO_TOLERANCE = {"snr": None, "matched": None, "score": None}


def compared(first, second, **options):
    given = {"data": None, "random": 2, "limit": None, "annotations": None, **options}
    return compare_files(first, second, overrides=NO_TOLERANCE, **given)


@pytest.fixture(scope="module")
def broken(surgered, tmp_path_factory):
    """The detector with a channel of a convolution in the middle doubled, and that one's output."""
    model = onnx.load(surgered)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    node = convolutions[len(convolutions) // 3]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
    value = numpy_helper.to_array(weight).copy()
    value[0] *= 2
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    path = tmp_path_factory.mktemp("broken") / "broken.onnx"
    onnx.save(model, path)
    return path, node.output[0]


@pytest.mark.slow
def test_the_first_tensor_that_differs_is_named(surgered, broken):
    path, name = broken
    found, document = compared(surgered, path, layers=True)
    assert not found.passed
    assert found.checks[0].what == f"first tensor out of tolerance, {name}: median SNR in dB"
    before = [one.snr_median for one in found.layers]
    index = [one.name for one in found.layers].index(name)
    assert index > 3
    assert before[:index] == [np.inf] * index
    assert len(document["layers"]) == len(found.layers)
    same, _ = compared(surgered, surgered, layers=True)
    assert same.passed
    assert {one.snr_median for one in same.layers} == {np.inf}
    heads_alone, _ = compared(surgered, path)
    assert not heads_alone.layers and not heads_alone.passed


@pytest.mark.slow
def test_tensors_between_layers_are_what_onnx_runtime_computes_before_the_heads(surgered):
    """Each changes with the image, and all heads follow from the last of them."""
    model = onnx.load(surgered)
    found = layer_tensors(model)
    heads = set(head_tensors(model).values())
    assert not heads & set(found)
    kinds = {output: node.op_type for node in model.graph.node for output in node.output}
    convolutions = {name for name, kind in kinds.items() if kind == "Conv"}
    assert convolutions - heads <= set(found)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found)
    session = ort.InferenceSession(model.SerializeToString())
    (image,) = session.get_inputs()
    images = np.random.default_rng(0).standard_normal((2, *image.shape[1:]), np.float32)
    for value in session.run(list(found), {image.name: images}):
        assert value.dtype == np.float32
        assert not np.array_equal(value[0], value[1])


def test_heads_in_another_order_are_not_held_against_others():
    model = write(Habits(channels="anchor first", priors="by cell"))
    with pytest.raises(SurgeryError, match="not in the operator's order"):
        head_tensors(model)
    after = insert_nms(model).model
    assert list(head_tensors(after).values()) == list(nms_node(after).input[:-1])


def manifest_of(content):
    return Manifest(
        backend="tensorrt",
        version="10.6.0",
        gpu=None,
        compute_capabilities=(),
        model="model.onnx",
        onnx_sha256=hashlib.sha256(content).hexdigest(),
        plugins=(),
        metadata={},
        engine_sha256="",
        engine_bytes=0,
        input=InputSpec("image", (3, 8, 8), "float32"),
        min_batch=1,
        opt_batch=1,
        max_batch=1,
        options={},
        seconds=0.0,
    )


@pytest.mark.parametrize("place", ["engines/model.onnx", "engines/renamed.onnx", "onnx/model.onnx"])
def test_the_onnx_file_of_a_plan_is_found_by_its_hash(surgered, tmp_path, place):
    for folder in ("engines", "onnx"):
        (tmp_path / folder).mkdir()
    (tmp_path / "engines" / "other.onnx").write_bytes(b"another model")
    manifest = manifest_of(surgered.read_bytes())
    engine = tmp_path / "engines" / "model.engine"
    assert find_source(engine, manifest, None) is None
    (tmp_path / place).write_bytes(surgered.read_bytes())
    assert find_source(engine, manifest, None).path == tmp_path / place
    assert find_source(engine, manifest, surgered).path == surgered
    with pytest.raises(EngineError, match=r"was built from another file, model\.onnx"):
        find_source(engine, replace(manifest, onnx_sha256="0"), surgered)

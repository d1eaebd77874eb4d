"""Data that ONNX files keep in other files, against onnx's own reader of its format."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from engine.support.external import MESSAGES, data_files, model_sha256


def outside(location):
    tensor = TensorProto(name="t", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*locations):
    """Tensors outside: an initialiser, a constant, in a subgraph, in a function, a sparse one."""
    names = iter(locations)
    graph = helper.make_graph([], "g", [], [], [outside(next(names))])
    graph.node.append(helper.make_node("Constant", [], ["c"], value=outside(next(names))))
    inner = helper.make_graph([], "inner", [], [], [outside(next(names))])
    graph.node.append(helper.make_node("If", ["b"], ["d"], then_branch=inner, else_branch=inner))
    constant = helper.make_node("Constant", [], ["e"], value=outside(next(names)))
    opset = helper.make_opsetid("", 17)
    function = helper.make_function("own", "F", [], ["e"], [constant], [opset])
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside(next(names)))
    graph.initializer.append(onnx.numpy_helper.from_array(np.arange(999.0), "location"))
    return helper.make_model(graph, functions=[function], opset_imports=[opset])


def test_the_numbers_of_fields_are_onnx_s():
    for name, fields in MESSAGES.items():
        known = getattr(onnx, name).DESCRIPTOR.fields
        messages = {one.number: one.message_type.name for one in known if one.message_type}
        assert fields == {
            number: kind
            for number, kind in messages.items()
            if kind in MESSAGES or (name, kind) == ("TensorProto", "StringStringEntryProto")
            if (name, number) != ("TensorProto", 16)  # notes beside a tensor
        }


def test_every_place_of_a_tensor(tmp_path):
    locations = ["initialiser.bin", "constant.bin", "sub/graph.bin", "function.bin", "sparse.bin"]
    (tmp_path / "m.onnx").write_bytes(model(*locations).SerializeToString())
    assert data_files(tmp_path / "m.onnx") == sorted(locations)


def test_hash(tmp_path):
    path, content = tmp_path / "m.onnx", model(*["w.bin"] * 5).SerializeToString()
    path.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"w\.bin"):
        model_sha256(path)
    found = set()
    for data in (b"0123456789abcdef", b"0123456789abcdeF"):
        (tmp_path / "w.bin").write_bytes(data)
        found.add(model_sha256(path))
        assert model_sha256(path) in found
    (tmp_path / "w.bin").rename(tmp_path / "v.bin")
    path.write_bytes(model(*["v.bin"] * 5).SerializeToString())
    assert len(found | {model_sha256(path)}) == 3


@given(st.binary(max_size=300))
def test_a_file_of_another_kind_has_its_own_hash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    assert model_sha256(path) == sha256(content).hexdigest()


@given(st.integers(0, 3000))
def test_a_truncated_model_is_no_error(tmp_path_factory, size):
    path = tmp_path_factory.getbasetemp() / "cut.onnx"
    path.write_bytes(model(*["w.bin"] * 5).SerializeToString()[:size])
    assert data_files(path) in ([], ["w.bin"])

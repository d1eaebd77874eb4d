"""Models that onnx.checker takes and that no library runs: refused when they are read."""

from __future__ import annotations

import re

import onnx
import pytest
from onnx import helper

from graph_surgery.errors import SurgeryError
from graph_surgery.files import load
from graph_surgery.replace import insert_nms
from tests.support.graphs import UNCAPPED, detector, nms_node

TYPE = "has the element type 99, which ONNX does not know"


def image(model):
    return model.graph.input[0].type.tensor_type


def constant(model):
    model.graph.node.append(
        helper.make_node("Constant", [], ["made"], value=onnx.TensorProto(data_type=99))
    )


BROKEN = {
    "input without a type": (lambda m: setattr(image(m), "elem_type", 0), "'image' has no element"),
    "input of a type that is none": (lambda m: setattr(image(m), "elem_type", 99), TYPE),
    "output without a type": (
        lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 0),
        "'bboxes' has no element type",
    ),
    "weights": (lambda m: setattr(m.graph.initializer[0], "data_type", 99), TYPE),
    "a constant": (constant, TYPE),
    "weights with values left over": (
        lambda m: m.graph.initializer[0].dims.__setitem__(0, 1),
        "tensor 'c0' has more or fewer values than its shape",
    ),
    "a Split of three that says two": (
        lambda m: m.graph.node.append(
            helper.make_node("Split", [m.graph.node[0].output[0]], ["x", "y", "z"], num_outputs=2)
        ),
        "Split '' has other outputs than it says",
    ),
    "less than no image": (
        lambda m: setattr(image(m).shape.dim[0], "dim_value", -3),
        r"input 'image' is \[-3, 3, 32, 32\]",
    ),
    "more images than memory": (
        lambda m: setattr(image(m).shape.dim[0], "dim_value", 2**40),
        r"input 'image' is \[1099511627776, 3, 32, 32\]",
    ),
}


def refusal(model, folder) -> str:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SurgeryError) as caught:
        load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_types_and_sizes_that_are_none(change, message, tmp_path):
    model = detector(UNCAPPED)
    change(model)
    assert re.search(message, refusal(model, tmp_path))


def calling(depth: int, last: str) -> onnx.ModelProto:
    """Functions each of which calls the next twice."""
    imports = 'opset_import: ["": 18, "d": 1]'
    functions = "".join(
        f'<domain: "d", {imports}> f{i} (a) => (c) {{ b = d.f{i + 1} (a) c = d.f{i + 1} (b) }}\n'
        for i in range(depth)
    )
    return onnx.parser.parse_model(
        f"<ir_version: 8, {imports}> g (float[1] x) => (float[1] y) {{ y = d.f0 (x) }}\n"
        f'{functions}<domain: "d", {imports}> f{depth} (a) => (c) {{ c = {last} (a) }}'
    )


def test_functions_that_no_memory_holds(tmp_path):
    assert "to 3.3e+12 nodes" in refusal(calling(40, "Relu"), tmp_path)
    assert "without end" in refusal(calling(3, "d.f1"), tmp_path)
    path = tmp_path / "few.onnx"
    onnx.save(calling(5, "Relu"), path)
    assert load(path).functions


@pytest.mark.parametrize("version", ["3", "", 3, 1.5, [1, 2]])
def test_a_version_of_the_plugin_that_is_not_known(version):
    model = insert_nms(detector(UNCAPPED)).model
    node = nms_node(model)
    (old,) = (one for one in node.attribute if one.name == "plugin_version")
    node.attribute.remove(old)
    node.attribute.append(helper.make_attribute("plugin_version", version))
    with pytest.raises(SurgeryError, match=r"plugin_version=.*known are '1' and '2'"):
        insert_nms(model)

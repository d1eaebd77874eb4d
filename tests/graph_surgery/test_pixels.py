"""Boxes in pixels: recognised, scaled to fractions, and said; other units are refused."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graph_surgery.errors import SurgeryError
from graph_surgery.heads import Heads, Level
from graph_surgery.inspect import read_tail
from graph_surgery.probe import decode, probe_boxes
from graph_surgery.replace import insert_nms
from tests.support.graphs import (
    IMAGE,
    PRIORS,
    UNCAPPED,
    assert_same_detections,
    detector,
    nms_node,
    rows_of_three,
    run,
)

PLAIN = replace(UNCAPPED, opset=18)


def in_units(decoded: float, given: float, **variant) -> onnx.ModelProto:
    """A detector whose image is so wide where boxes are decoded, and so wide in its outputs."""
    model = detector(replace(PLAIN, **variant))
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [1, PRIORS, 2]:
            values = numpy_helper.to_array(tensor) * np.float32(decoded)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    factor = numpy_helper.from_array(np.float32(given / decoded), "factor")
    model.graph.initializer.append(factor)
    node = next(node for node in model.graph.node if node.output[0] == "bboxes")
    node.output[0] = "decoded"
    model.graph.node.append(helper.make_node("Mul", ["decoded", "factor"], ["bboxes"]))
    onnx.checker.check_model(model, full_check=True)
    return model


def priors_of(model: onnx.ModelProto) -> np.ndarray:
    name = nms_node(model).input[-1]
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize("yxyx", [False, True])
@pytest.mark.parametrize(
    ("decoded", "given", "said"),
    [
        (IMAGE, IMAGE, "decoded and given in pixels of 32 x 32: the priors were scaled"),
        (IMAGE, 1, "decoded in pixels of 32 x 32: the priors were scaled"),
        (1, IMAGE, "given in pixels of 32 x 32: detections"),
    ],
)
def test_pixels_become_fractions(decoded, given, said, yxyx):
    model = in_units(decoded, given, yxyx=yxyx)
    result = insert_nms(model)
    assert any(said in change for change in result.changes)
    assert metadata(result.model) == {
        "made_by": "hand",
        "box_units": "fractions of the image; before the surgery in pixels of 32 x 32",
    }
    plain = insert_nms(detector(replace(PLAIN, yxyx=yxyx))).model
    np.testing.assert_allclose(priors_of(result.model), priors_of(plain), atol=1e-6)
    image = np.random.default_rng(4).normal(size=(1, 3, IMAGE, IMAGE)).astype(np.float32)
    boxes, labels, scores = run(model, {"image": image})
    order = (0, 1, 2, 3) if yxyx else (1, 0, 3, 2)
    expected = rows_of_three(boxes / given, labels, scores, order)
    detections, count = run(result.model, {"image": image})
    assert count[0] > 0
    assert ((detections[0, : count[0], 1:5] % 1) > 0).any()
    assert_same_detections(detections[0, : count[0], 1:], expected)


def test_fractions_are_not_spoken_of():
    result = insert_nms(in_units(1, 1))
    assert not any("pixels" in change for change in result.changes)
    assert metadata(result.model) == {"made_by": "hand"}


def test_inspection_knows_pixels():
    assert read_tail(in_units(IMAGE, IMAGE))[0].pixels
    assert not read_tail(in_units(1, IMAGE))[0].pixels


def test_units_that_are_neither_are_refused():
    with pytest.raises(SurgeryError, match="span 300 x 300, not 1 x 1, nor 32 x 32 pixels"):
        insert_nms(in_units(300, 300))
    with pytest.raises(SurgeryError, match="disagree"):
        insert_nms(in_units(1, 300))


sizes = st.integers(8, 4000)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(2, 9), st.integers(2, 9)), sizes, sizes, st.booleans(), st.booleans())
def test_the_unit_of_any_image(grid, image_height, image_width, pixels, yxyx):
    """A tail in numpy, float32, whose image is not square."""
    height, width = grid
    unit = np.array([image_width, image_height] if pixels else [1, 1])
    rows, columns = np.divmod(np.arange(height * width), width)
    centre = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=1)
    half = np.array([0.1, 0.2])
    fractions = np.concatenate([centre - half, centre + half], axis=1)
    variances = np.array([0.1, 0.1, 0.2, 0.2])

    def tail(loc, _conf):
        boxes = decode(fractions * np.tile(unit, 2), variances, loc[0].T.astype(np.float64))
        boxes = boxes[:, [1, 0, 3, 2]] if yxyx else boxes
        return {"boxes": boxes[None].astype(np.float32)}

    heads = Heads((Level("loc", "conf", 1, height, width),), 3, 1)
    found, decoded = probe_boxes(tail, heads, (image_width, image_height))
    assert decoded.unit == ((image_width, image_height) if pixels else (1, 1))
    np.testing.assert_allclose(found[0].reshape(-1, 4), fractions, atol=1e-5)
    np.testing.assert_allclose(found[1].reshape(-1, 4), np.tile(variances, (len(found[0]) // 4, 1)))

"""Which labels the classes of a detector have."""

from pathlib import Path

import onnx
import pytest

from engine.model import Detector
from graph_surgery.replace import insert_nms
from tests.support.graphs import CLASSES, UNCAPPED, detector, nms_node


@pytest.mark.parametrize(
    ("background", "classes", "first"), [(0, CLASSES - 1, 1), (-1, CLASSES, 0), (4, CLASSES - 1, 0)]
)
def test_labels_count_from_0_unless_that_is_the_background(background, classes, first):
    model = insert_nms(detector(UNCAPPED)).model
    (attribute,) = (a for a in nms_node(model).attribute if a.name == "backgroundLabelId")
    attribute.i = background
    found = Detector(Path("m.onnx"), model)
    assert (found.classes, found.first_label) == (classes, first)


@pytest.mark.parametrize(("said", "first"), [({}, 1), ({"first_label": "0"}, 0)])
def test_a_model_before_its_surgery_says_it_in_its_metadata(said, first):
    model = detector(UNCAPPED)
    onnx.helper.set_model_props(model, said)
    assert Detector(Path("m.onnx"), model).first_label == first

"""The surgery on this project's own export of a RetinaNet, 128x160 and 12 classes."""

from collections import Counter
from dataclasses import asdict

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.onnx_export import Detector, export_detector, without_heads
from export.retinanet.anchors import anchors
from graph_surgery.inspect import read_tail
from graph_surgery.replace import insert_nms
from tests.support.graphs import nms_node
from tests.support.retinanet import SMALL, random_model
from tests.support.retinanet_golden import retinanet_attributes


@pytest.fixture(scope="module")
def exported():
    return without_heads(export_detector(Detector(random_model(SMALL)).eval()))


@pytest.fixture(scope="module")
def surgered(exported):
    return insert_nms(exported).model


def run(model, images):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})


def test_detections_are_the_same(exported, surgered):
    torch.manual_seed(2)
    images = torch.randn(3, 3, *SMALL.image_shape).numpy()
    before, after = run(exported, images), run(surgered, images)
    assert before[1].tolist() == after[1].tolist()
    assert before[1].min() > 10
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)


def test_attributes_and_anchors(surgered):
    tail, _ = read_tail(surgered)
    assert asdict(tail.attributes) == {
        name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
        for name, value in asdict(retinanet_attributes(12)).items()
    }
    np.testing.assert_allclose(tail.priors[0].reshape(-1, 4), anchors(SMALL), atol=1e-6)


def test_filters_of_heads_are_put_in_order_once(surgered):
    made = {name: node for node in surgered.graph.node for name in node.output}
    heads = [made[name] for name in nms_node(surgered).input[:-1]]
    assert sorted(Counter(head.input[1] for head in heads).values()) == [5, 5]

"""The official resnet34-ssd1200.onnx as a second entrance, on a graph rebuilt like it.

That file cannot be shipped. What is known of it, from the names of its nodes in published scripts:
opset 10 with the weights among the graph's inputs, batch 1, batch norms as nodes of their own (its
first head convolution is Conv_338: 218 entries of the state dict, the image and the 119 nodes that
the network has with batch norms come before it), one NonMaxSuppression that caps 200 boxes of a
class after suppression, and the outputs bboxes, labels and scores.
"""

from __future__ import annotations

import io
import sys
import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from export.ssd_resnet34.config import SSDConfig
from export.ssd_resnet34.default_boxes import default_boxes
from export.ssd_resnet34.model import SSDResNet34
from graph_surgery.cli import main
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.verify import NETWORK_TOLERANCE
from tests.support import graphs
from tests.support.calibrated import run as run_tensors
from tests.support.calibrated import snr_db, write_images
from tests.support.graphs import Builder, Variant, assert_same_detections, rows_of_three, run

pytestmark = pytest.mark.slow

SIZE = 400
VARIANT = Variant(cap=200, keep=200, overlap=0.5)


def network(config: SSDConfig) -> onnx.ModelProto:
    """Backbone and heads from the TorchScript exporter, with random weights, not optimised."""
    import torch

    torch.manual_seed(1)
    model = SSDResNet34(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative average: statistics of the images below
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            loc, conf = self.model(images)
            return (*loc, *conf)

    with torch.no_grad():
        model.train()(torch.randn(4, 3, SIZE, SIZE))
        for head in (*model.loc, *model.conf):
            head.weight.mul_(4)  # spread the logits, so that some scores pass the threshold
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Flat().eval(),
            (torch.zeros(1, 3, SIZE, SIZE),),
            file,
            input_names=["image"],
            output_names=[f"head_{i}" for i in range(12)],
            opset_version=10,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,  # else the exporter folds the batch norms
            do_constant_folding=False,
            keep_initializers_as_inputs=True,
        )
    return onnx.load_from_string(file.getvalue())


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The rebuilt graph, as a file."""
    config = SSDConfig(image_size=SIZE, width=4)
    model = network(config)
    heads = [value.name for value in model.graph.output]
    priors = default_boxes(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "CLASSES", config.num_classes)
        patch.setattr(graphs, "PRIORS", len(priors))
        patch.setattr(graphs, "grid_priors", lambda: priors)
        tail = Builder(10)
        joined = [
            graphs._join(tail, heads[:6], 4, VARIANT),
            graphs._join(tail, heads[6:], config.num_classes, VARIANT),
        ]
        graphs._postprocess(tail, *joined, VARIANT)
    graph = model.graph
    graph.node.extend(tail.nodes)
    graph.initializer.extend(tail.initializers)
    graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tail.initializers
    )
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("bboxes", TensorProto.FLOAT, [1, "nbox", 4]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [1, "nbox"]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, "nbox"]),
        ]
    )
    onnx.checker.check_model(model)
    assert sum(node.op_type == "BatchNormalization" for node in graph.node) == 29
    path = tmp_path_factory.mktemp("official") / "resnet34-ssd.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def surgery(official):
    """The command that a user types: the file that it wrote, and what it said."""
    path = official.with_suffix(".nms.onnx")
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "argv", ["graph-surgery", "nms", str(official), str(path)])
        patch.setattr(sys, "stdout", said)
        with pytest.raises(SystemExit) as exit_:
            main()
    assert not exit_.value.code
    return path, said.getvalue()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).standard_normal((3, 3, SIZE, SIZE), np.float32)


def test_every_difference_is_named(surgery):
    _, said = surgery
    assert "kept 200 boxes of a class after suppression" in said
    assert "29 batch norms were folded" in said
    assert "opset 10 became 18" in said
    assert "the batch, fixed at 1, became dynamic" in said
    assert "boxes xmin, ymin, xmax, ymax" in said


def test_three_images_at_once_are_three_runs_of_the_original(official, surgery, images):
    model, new = onnx.load(official), onnx.load(surgery[0])
    detections, count = run(new, {"image": images})
    assert count.min() > 3
    # Folding batch norms and other batches round otherwise, on every processor: the heads to this
    # share of their spread, which the surgery proves; scores and boxes move less than logits do.
    heads = run_tensors(new, images, list(find_placement(new).heads))
    atol = NETWORK_TOLERANCE * max(head.std() for head in heads)
    for number, image in enumerate(images):
        bboxes, labels, scores = run(model, {"image": image[None]})
        # fewer than its cap: the one difference in meaning does not show
        assert np.bincount(labels[0]).max() < 200
        rows = detections[number, : count[number]]
        assert (rows[:, 0] == number).all()
        expected = rows_of_three(bboxes, labels, scores)
        assert_same_detections(rows[:, 1:], expected, atol)


def test_it_can_be_calibrated_and_quantised(surgery, images, tmp_path):
    model = onnx.load(surgery[0])
    placement = find_placement(model)
    assert len(placement.layers) == 51  # convolutions of SSD-ResNet34
    source = write_images(tmp_path, images)
    calibration = calibrate(load_detector(surgery[0]), source, batch=3)
    new = quantize(model, calibration)
    (scale,) = (float(p.value) for p in new.metadata_props if p.key == "input_scale")
    whole = np.clip(np.rint(images / scale), -127, 127).astype(np.int8)
    heads = list(placement.heads)
    before, after = (run_tensors(m, feed, heads) for m, feed in ((model, images), (new, whole)))
    assert snr_db(before, after) > 9  # random weights, 4 channels wide
    detections, count = run(new, {"image": whole})
    assert detections.shape == (3, 200, 7)
    assert count.min() > 0
    assert [node.op_type for node in new.graph.node].count(OP_TYPE) == 1

"""Equalisation: the same answers in float, ranges nearer to each other, less lost in INT8."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.equalise import equalise
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from graph_surgery.replace import insert_nms
from tests.support.calibrated import activations, heads, run, snr_db, to_int8, write_images
from tests.support.graphs import IMAGE, UNCAPPED, detector

PIXELS = np.random.default_rng(3).uniform(-1.8, 2.2, (5, 3, IMAGE, IMAGE)).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A detector whose first convolution makes channels of very different ranges."""
    folder = tmp_path_factory.mktemp("equalise")
    model = insert_nms(detector(replace(UNCAPPED, norms=True, opset=18))).model
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    first, *others = (node for node in model.graph.node if node.op_type == "Conv")
    readers = [node for node in others if node.input[0] == others[0].input[0]]
    spread = np.geomspace(1, 1e-3, 12).astype(np.float32)
    for name, factor in (
        (first.input[1], spread[:, None, None, None]),
        (first.input[2], spread),
        *((node.input[1], 1 / spread[:, None, None]) for node in readers),
    ):
        new = (numpy_helper.to_array(values[name]) * factor).astype(np.float32)
        values[name].CopyFrom(numpy_helper.from_array(new, name))
    onnx.save(model, folder / "model.onnx")
    return load_detector(folder / "model.onnx"), write_images(folder, PIXELS)


def ranges(model: onnx.ModelProto, tensor: str) -> np.ndarray:
    return np.abs(activations(model, PIXELS)[tensor]).max(axis=(2, 3)).mean(axis=0)


def test_float_is_the_same_and_int8_is_better(place) -> None:
    known, images = place
    new = equalise(known, images)
    reference = run(known.model, PIXELS, heads(known.model))
    assert snr_db(reference, run(new, PIXELS, heads(new))) > 100
    found = []
    for model in (known, replace(known, model=new)):
        int8 = quantize(model.model, calibrate(model, images))
        found.append(snr_db(reference, run(int8, to_int8(int8, PIXELS), heads(int8))))
    assert found[1] > found[0] + 1


def test_ranges_come_nearer_by_a_quarter_of_their_ratio_in_logarithms(place) -> None:
    known, images = place
    new = equalise(known, images)
    (tensor, *_) = find_placement(known.model).tensors[1:]
    before, after = ranges(known.model, tensor), ranges(new, tensor)
    share = np.maximum(before / before.max(), 1 / 32)
    np.testing.assert_allclose(after, before / share**0.25, rtol=1e-5)
    assert {"equalised_on": "5"}.items() <= {e.key: e.value for e in new.metadata_props}.items()


def test_additions_join_what_has_the_same_factors(surgered, small_images, tmp_path) -> None:
    """SSD-ResNet34, where residual blocks join all tensors of a stage."""
    known, images = load_detector(surgered), write_images(tmp_path, small_images)
    new = equalise(known, images)
    reference = run(known.model, small_images, heads(known.model))
    assert snr_db(reference, run(new, small_images, heads(new))) > 100
    before, after = (activations(model, small_images[:1]) for model in (known.model, new))
    for name in set(find_placement(known.model).tensors) - {"image"}:
        assert not np.allclose(before[name], after[name], rtol=1e-3)


def test_another_network_takes_its_own_calibration(place) -> None:
    known, images = place
    new = equalise(known, images)
    with pytest.raises(EngineError, match="other weights"):
        quantize(new, calibrate(known, images))

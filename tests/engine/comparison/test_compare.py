"""Comparing detectors: figures by hand, PyTorch, and broken models."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import OrderedDict

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from rich.console import Console

from engine.comparison.compare import compare, load_truth
from engine.comparison.runners import IMAGES, find_side, open_side
from engine.comparison.tensors import shown
from engine.comparison.tolerance import FLOAT_TOLERANCE, Tolerance
from engine.data.preprocessed import quantize_images
from engine.errors import EngineError
from engine.protocol import InputSpec
from engine.report import comparison_tables
from engine.support.files import write_json
from tests.support.boxes import iou

ANYTHING = Tolerance(snr=-math.inf, matched=0.0, score=math.inf, precision=0.0)


class Fixed(BaseRunner):
    """Gives the same outputs for every image, in turn."""

    def __init__(self, name, outputs):
        super().__init__(name=name)
        self.outputs = outputs

    def activate_impl(self):
        self.turn = iter(self.outputs)

    def get_input_metadata_impl(self):
        return TensorMetadata().add(IMAGES, np.float32, (None, 3, 2, 2))

    def infer_impl(self, feed_dict):  # noqa: ARG002
        self.inference_time = 0.0
        return OrderedDict(next(self.turn))


def open_one(path, name):
    side = find_side(path, name)
    return open_side(side, shown(side.detector))


def outputs(rows, **heads):
    detections = np.zeros((1, 6, 7), np.float32)
    detections[..., 6] = -1
    detections[0, : len(rows)] = np.reshape(rows, (-1, 7))
    return heads | {
        "detections": detections,
        "num_detections": np.array([len(rows)], np.int32),
    }


def blank(count):
    return (np.zeros((3, 2, 2), np.float32) for _ in range(count))


CAT = (0, 0.1, 0.1, 0.5, 0.5, 0.8, 3)
CAT_NEAR = (0, 0.1, 0.1, 0.5, 0.49, 0.7, 3)
DOG = (0, 0.1, 0.1, 0.5, 0.5, 0.8, 4)


def test_figures_of_heads_and_detections():
    random = np.random.default_rng(0)
    a = [random.standard_normal((1, 8, 3, 3)).astype(np.float32) for _ in range(3)]
    b = [x + np.float32(scale) * np.ones_like(x) for x, scale in zip(a, (0.1, 0.2, 0), strict=True)]
    first = Fixed(
        "a", [outputs(rows, loc_0=x) for rows, x in zip([[CAT], [CAT, DOG], []], a, strict=True)]
    )
    second = Fixed(
        "b",
        [outputs(rows, loc_0=x) for rows, x in zip([[CAT_NEAR], [CAT], [DOG]], b, strict=True)],
    )
    found = compare(first, second, blank(3), ANYTHING)
    (head,) = found.heads
    snr = [
        10 * math.log10(np.square(x, dtype=float).mean() / np.square(x.astype(float) - y).mean())
        for x, y in zip(a[:2], b[:2], strict=True)
    ]
    assert head.name == "loc_0" and head.worst_image == 1
    assert head.snr_least == pytest.approx(snr[1], abs=1e-3)
    assert head.snr_median == pytest.approx(snr[0], abs=1e-3)  # the third is infinite
    assert head.absolute_largest == pytest.approx(0.2, abs=1e-5)
    assert head.absolute_mean == pytest.approx(0.1, abs=1e-5)
    relative = [np.median(np.abs((x - y) / y)) for x, y in zip(a, b, strict=True)]
    assert head.relative_median == pytest.approx(np.mean(relative), rel=1e-4)
    pairs = found.detections
    assert (pairs.first, pairs.second) == (3, 3)
    assert (pairs.matched, pairs.missed, pairs.extra) == (2, 1, 1)
    assert pairs.share == pytest.approx(4 / 6)
    assert pairs.iou_mean == pytest.approx((iou(CAT[1:5], CAT_NEAR[1:5]) + 1) / 2)
    assert pairs.score_largest == pytest.approx(0.1)
    assert found.passed and found.images == 3


@pytest.mark.parametrize(
    ("tolerance", "failing"),
    [
        (Tolerance(snr=41, matched=0, score=1, precision=0), "SNR"),
        (Tolerance(snr=0, matched=0.7, score=1, precision=0), "matched"),
        (Tolerance(snr=0, matched=0, score=0.05, precision=0), "score"),
    ],
)
def test_each_tolerance_fails_alone(tolerance, failing):
    x = np.ones((1, 4, 1, 1), np.float32)
    first = Fixed("a", [outputs([CAT, DOG], conf_0=x)])
    second = Fixed("b", [outputs([CAT_NEAR], conf_0=x * np.float32(1.01))])
    found = compare(first, second, blank(1), tolerance)
    assert not found.passed
    assert [failing in check.what for check in found.checks if not check.passed] == [True]


@pytest.mark.parametrize("crowd", [True, False])
def test_without_ground_truth_there_is_no_precision_to_fail(crowd, tmp_path):
    """Also where all of it is to be ignored."""
    path = tmp_path / "truth.json"
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 10}],
        "annotations": [{**box, "iscrowd": 1}] if crowd else [],
        "categories": [{"id": number, "name": str(number)} for number in range(1, 81)],
    }
    path.write_text(json.dumps(content))
    sides = [Fixed(name, [outputs([CAT])]) for name in "ab"]
    found = compare(*sides, blank(1), FLOAT_TOLERANCE, truth=load_truth(path, ["a.jpg"]))
    assert found.passed
    console = Console(file=io.StringIO())
    console.print(comparison_tables(found))
    assert "no ground truth" in console.file.getvalue()
    write_json(tmp_path / "figures.json", found.to_dict())
    assert json.loads((tmp_path / "figures.json").read_text())["precision"] == [None, None]


def test_nan_fails_and_is_null_in_json(tmp_path):
    good = np.ones((1, 4, 1, 1), np.float32)
    found = compare(
        Fixed("a", [outputs([CAT], loc_0=good)] * 3),
        Fixed("b", [outputs([CAT], loc_0=x) for x in (good, good * np.nan, good)]),
        blank(3),
        ANYTHING,
    )
    assert not found.passed
    write_json(tmp_path / "c.json", found.to_dict())
    written = json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)
    assert written["heads"][0]["snr_least"] is None
    assert written["passed"] is False


def test_sides_that_cannot_be_compared():
    small, large = (np.ones((1, 4, n, n), np.float32) for n in (1, 2))
    sides = [Fixed(n, [outputs([], loc_0=x)]) for n, x in (("a", small), ("b", large))]
    with pytest.raises(EngineError, match=r"loc_0 is .* different networks"):
        compare(*sides, blank(1), ANYTHING)
    with pytest.raises(EngineError, match="no images"):
        compare(*sides, blank(0), ANYTHING)
    sides = [Fixed("a", [outputs([CAT], loc_0=small)]), Fixed("b", [outputs([CAT], loc_1=small)])]
    with pytest.raises(EngineError, match="not the same ones: these are different networks"):
        compare(*sides, blank(1), ANYTHING)


def test_nothing_detected_and_no_heads_is_no_agreement():
    with pytest.raises(EngineError, match="nothing to compare"):
        compare(Fixed("a", [outputs([])]), Fixed("b", [outputs([])]), blank(1), ANYTHING)


def test_without_common_heads_detections_are_compared():
    x = np.ones((1, 4, 1, 1), np.float32)
    found = compare(
        Fixed("a", [outputs([CAT], loc_0=x)]), Fixed("b", [outputs([CAT])]), blank(1), ANYTHING
    )
    assert found.heads == ()
    assert found.detections.matched == 1
    assert not any("SNR" in check.what for check in found.checks)


@given(st.floats(2**-10, 1, width=32), st.integers(0, 2**32 - 1))
def test_quantized_images_are_the_nearest_steps(scale, seed):
    images = np.random.default_rng(seed).normal(0, 60 * scale, (1, 3, 4, 4)).astype(np.float32)
    images[0, 0, 0] = np.float32(scale) * np.array([0.5, 1.5, -0.5, 1e6], np.float32)
    found = quantize_images(images, InputSpec("image", (3, 4, 4), "int8", scale))
    assert found.dtype == np.int8
    ratio = images / np.float32(scale)
    assert found.min() >= -127
    inside = np.abs(ratio) <= 127
    assert (np.abs(found - ratio)[inside] <= 0.5).all()
    assert (np.abs(found.astype(int)) == 127)[~inside].all()
    halves = np.abs(np.abs(ratio % 1) - 0.5) < 1e-12
    assert (found[halves] % 2 == 0).all()


def test_surgered_against_unsurgered(exported, surgered, small_images):
    first, second = open_one(exported, "a"), open_one(surgered, "b")
    found = compare(first.runner, second.runner, small_images, FLOAT_TOLERANCE)
    assert found.passed
    assert [head.name for head in found.heads] == [
        f"{kind}_{level}" for kind in ("loc", "conf") for level in range(6)
    ]
    assert found.detections.matched == found.detections.first > 50


class TorchRunner(BaseRunner):
    """The PyTorch model behind the contract of `engine.comparison.runners`."""

    def __init__(self, model):
        super().__init__(name="torch")
        self.model = model

    def get_input_metadata_impl(self):
        size = self.model.config.image_size
        return TensorMetadata().add(IMAGES, np.float32, (None, 3, size, size))

    def infer_impl(self, feed_dict):
        import torch

        from export.ssd_resnet34.postprocess import SSDPostProcess

        self.inference_time = 0.0
        with torch.no_grad():
            loc, conf = self.model(torch.from_numpy(feed_dict[IMAGES]))
            detections, count = SSDPostProcess(self.model.config)(loc, conf)
        heads = {f"loc_{i}": x.numpy() for i, x in enumerate(loc)}
        heads |= {f"conf_{i}": x.numpy() for i, x in enumerate(conf)}
        return heads | {"detections": detections.numpy(), "num_detections": count.numpy()}


def test_onnx_runtime_against_pytorch(small_model, surgered, small_images):
    found = compare(
        TorchRunner(small_model), open_one(surgered, "b").runner, small_images, FLOAT_TOLERANCE
    )
    assert found.passed, found.checks
    assert len(found.heads) == 12
    assert all(80 < head.snr_least < math.inf for head in found.heads)
    assert found.detections.first > 50


def test_another_network_fails(small_model, surgered, small_images):
    """The same architecture with one weight of one head changed."""
    import copy

    import torch

    other = copy.deepcopy(small_model)
    with torch.no_grad():
        other.conf[2].weight[7] *= 2
    found = compare(
        TorchRunner(other), open_one(surgered, "b").runner, small_images, FLOAT_TOLERANCE
    )
    assert not found.passed
    assert [head.name for head in found.heads if head.snr_least < 60] == ["conf_2"]


def test_a_fixed_batch_is_filled(surgered, small_images, tmp_path):
    model = onnx.load(surgered)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "fixed.onnx")
    found = compare(
        open_one(surgered, "a").runner,
        open_one(tmp_path / "fixed.onnx", "b").runner,
        small_images[:1],
        FLOAT_TOLERANCE,
    )
    assert found.passed and found.detections.matched > 10


def test_precision_is_that_of_pycocotools(surgered, small_images, tmp_path):
    """Annotations made of the model's own best boxes, evaluated here by hand."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    runner = open_one(surgered, "a").runner
    height, width = 300, 500
    truth = {
        "images": [
            {"id": 7 + i, "file_name": f"{i}.jpg", "height": height, "width": width}
            for i in range(len(small_images))
        ],
        "categories": [{"id": 2 * label, "name": str(label)} for label in range(1, 81)],
        "annotations": [],
    }
    results = []
    with runner:
        for index, image in enumerate(small_images):
            found = runner.infer({IMAGES: image[None]})
            for rank, row in enumerate(found["detections"][0, : found["num_detections"][0]]):
                size = np.array([height, width, height, width])
                ymin, xmin, ymax, xmax = (float(v) for v in row[1:5] * size)
                bbox = [xmin, ymin, xmax - xmin, ymax - ymin]
                entry = {"image_id": 7 + index, "category_id": 2 * int(row[6]), "bbox": bbox}
                results.append(entry | {"score": float(row[5])})
                if rank % 3 == 0:  # a third is right, somewhat displaced
                    bbox = [bbox[0] + 0.05 * bbox[2], *bbox[1:]]
                    extra = {"id": len(truth["annotations"]) + 1, "iscrowd": 0}
                    area = bbox[2] * bbox[3]
                    truth["annotations"].append(entry | extra | {"bbox": bbox, "area": area})
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = evaluation.stats[0]
    assert 0.05 < expected < 0.95
    loaded = load_truth(path, [f"{i}.jpg" for i in range(len(small_images))])
    found = compare(
        runner, open_one(surgered, "b").runner, small_images, FLOAT_TOLERANCE, truth=loaded
    )
    assert found.precision == (pytest.approx(expected, abs=1e-6), found.precision[0])
    with pytest.raises(EngineError, match=r"lacks 1 of 2 images, the first is x\.jpg"):
        load_truth(path, ["0.jpg", "x.jpg"])

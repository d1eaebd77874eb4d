"""The network, its default boxes and its export, against golden data and PyTorch."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.agreement import compare_with_onnxruntime
from export.checkpoint import infer_config, load_model, read_checkpoint
from export.errors import ExportError
from export.onnx_export import (
    Detector,
    export_detector,
    fold_batch_norms,
)
from export.postprocess import greedy_nms, stable_topk
from export.ssd_resnet34.config import SSDConfig
from export.ssd_resnet34.default_boxes import default_boxes
from export.ssd_resnet34.model import SSDResNet34
from export.ssd_resnet34.postprocess import SSDPostProcess

MLPERF = SSDConfig()
GRIDS, SHAPES = (50, 25, 13, 7, 3, 3), (4, 6, 6, 6, 4, 4)


def split_levels(joined: np.ndarray, grids=GRIDS, shapes=SHAPES) -> list[torch.Tensor]:
    """[rows, P] to the head tensors [1, rows * A, g, g], as the convolutions leave them."""
    levels, start = [], 0
    for grid, anchors in zip(grids, shapes, strict=True):
        stop = start + anchors * grid * grid
        level = np.ascontiguousarray(joined[:, start:stop], np.float32)
        levels.append(torch.from_numpy(level.reshape(1, -1, grid, grid)))
        start = stop
    assert start == joined.shape[1]
    return levels


def test_state_dict_is_the_references(golden):
    with torch.device("meta"):
        state = SSDResNet34(MLPERF).state_dict()
    expected = json.loads((golden / "state_dict.json").read_text())
    assert [(name, list(t.shape), str(t.dtype)) for name, t in state.items()] == [
        (entry["name"], entry["shape"], f"torch.{entry['dtype']}") for entry in expected
    ]


def test_default_boxes_are_the_references(golden):
    expected = np.load(golden / "default_boxes.npz")
    boxes = default_boxes(MLPERF)
    assert boxes.dtype == np.float32
    assert boxes.shape == (MLPERF.num_priors, 4) == expected["xywh"].shape
    np.testing.assert_allclose(boxes, expected["xywh"], atol=1e-6)


@pytest.mark.parametrize("config", [MLPERF, SSDConfig(400, 81, 16), SSDConfig(512, 5, 8)])
def test_config_predicts_the_head_tensors(config):
    """The configuration's arithmetic, against PyTorch's own convolutions."""
    with torch.device("meta"):
        loc, conf = SSDResNet34(config)(torch.zeros(2, 3, config.image_size, config.image_size))
    anchors = [t.shape[1] // 4 for t in loc]
    assert [tuple(t.shape[2:]) for t in loc] == [(g, g) for g in config.grid_sizes]
    assert [t.shape[1] for t in conf] == [a * config.num_classes for a in anchors]
    assert sum(a * t.shape[2] * t.shape[3] for a, t in zip(anchors, loc, strict=True)) == len(
        default_boxes(config)
    )


@pytest.mark.parametrize(
    "fields", [{"image_size": 100}, {"image_size": 0}, {"width": 3}, {"num_classes": 1}]
)
def test_config_refuses(fields):
    with pytest.raises(ExportError):
        SSDConfig(**fields)


@pytest.mark.parametrize("text", ["", "[]", "{}x", '{"depth": 3}', '{"width": null}'])
def test_config_json_refuses(text):
    with pytest.raises(ExportError):
        SSDConfig.from_json(text)
    config = SSDConfig(500, 3, 6)
    assert SSDConfig.from_json(config.to_json()) == config


def test_folded_batch_norms_change_nothing(small_model, small_images):
    folded = fold_batch_norms(small_model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    images = torch.from_numpy(small_images[:1])
    with torch.inference_mode():
        for kind, expected in zip(folded(images), small_model(images), strict=True):
            for a, b in zip(kind, expected, strict=True):
                assert (a - b).abs().max() <= 1e-4 * (b.max() - b.min())


def test_stable_topk_breaks_ties_by_index():
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    top, index = stable_topk(values, 4)
    assert index.tolist() == [[1, 2, 4, 3]]
    assert top.tolist() == [[3.0, 3.0, 3.0, 2.0]]


def test_greedy_nms_by_hand():
    """IoU exactly at the threshold survives; a suppressed box suppresses nothing."""
    boxes = torch.tensor(
        [[[0, 0, 2, 1], [0, 0, 1, 1], [0.5, 0, 2.5, 1], [1.5, 0, 3.5, 1], [9, 9, 9, 9]]]
    ).float()  # IoU with the first: 1, 0.5, 0.6, 0.14, 0
    scores = torch.tensor([[[0.9, 0.8, 0.7, 0.6, 0.05]]])
    assert greedy_nms(boxes, scores, 0.5, 0.05).tolist() == [[[True, True, False, True, False]]]


@pytest.mark.parametrize("case", [1, 2, 3])
def test_postprocess_gives_the_golden_detections(golden, case):
    data = np.load(golden / f"nms_{case}.npz")
    detections, count = SSDPostProcess(MLPERF)(
        split_levels(data["loc"]), split_levels(data["conf"])
    )
    rows = detections[0, : count[0]].numpy()
    assert rows[:, 6].tolist() == data["labels"].tolist()
    np.testing.assert_allclose(rows[:, 5], data["scores"], atol=1e-5)
    expected = data["boxes_ltrb"].clip(0, 1)[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(rows[:, 1:5], expected, atol=1e-5)


def test_postprocess_voids_broken_priors_only(golden):
    """NaN or infinite values remove their own prior and nothing else."""
    data = np.load(golden / "nms_1.npz")
    loc, conf = data["loc"].astype(np.float32), data["conf"].astype(np.float32)
    rng = np.random.default_rng(3)
    logits = np.exp(conf - conf.max(0)) / np.exp(conf - conf.max(0)).sum(0)
    busy = np.flatnonzero(logits[1:].max(0) > 0.05)
    broken = rng.choice(busy, 40, replace=False)
    reference_conf = conf.copy()
    reference_conf[0, broken] = 1e4  # background with certainty: the prior has no candidate
    expected, expected_count = SSDPostProcess(MLPERF)(
        split_levels(loc), split_levels(reference_conf)
    )
    bad = [np.nan, np.inf, -np.inf, np.nan]
    for i, prior in enumerate(broken):
        if i % 2:
            conf[rng.integers(81), prior] = bad[i % 4]
        else:
            loc[rng.integers(4), prior] = [np.nan, np.inf][i // 2 % 2]
    loc[3, broken[0]] = 1e5  # finite, but its exponential is not
    detections, count = SSDPostProcess(MLPERF)(split_levels(loc), split_levels(conf))
    assert count.tolist() == expected_count.tolist()
    np.testing.assert_allclose(detections, expected, atol=1e-6)


def test_exported_file_is_self_contained(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    (image,) = model.graph.input
    dims = image.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [d.dim_value for d in dims[1:]] == [3, 400, 400]
    assert [o.name for o in model.graph.output] == ["detections", "num_detections"]


def test_exported_metadata(exported, small_checkpoint, small_model):
    from hashlib import sha256

    metadata = {p.key: p.value for p in onnx.load(exported).metadata_props}
    assert SSDConfig.from_json(metadata["ssd_config"]) == small_model.config
    assert metadata["weights_sha256"] == sha256(small_checkpoint.read_bytes()).hexdigest()
    assert metadata["ssd_resnet34_trt_version"]


@pytest.mark.parametrize("batch", [1, 3])
def test_exported_file_equals_pytorch(exported, small_model, small_images, batch):
    images = small_images[:batch]
    session = ort.InferenceSession(exported, providers=["CPUExecutionProvider"])
    detections, count = session.run(None, {"image": images})
    with torch.inference_mode():
        postprocess = SSDPostProcess(small_model.config)
        wanted, wanted_count = postprocess(*small_model(torch.from_numpy(images)))
    assert count.tolist() == wanted_count.tolist()
    assert count.min() > 0
    assert detections.shape == (batch, 200, 7)
    for image in range(batch):
        rows, expected = detections[image], wanted[image].numpy()
        n = count[image]
        np.testing.assert_allclose(np.sort(rows[:n, 5]), np.sort(expected[:n, 5]), atol=1e-4)
        overlap = (np.abs(rows[:n, None] - expected[None, :n]).max(-1) < 1e-3).any(1)
        assert overlap.mean() > 0.99  # heads differ by rounding, which may tip a box over an edge
        assert (rows[:, 0] == image).all()
        assert (rows[n:, 1:] == [0, 0, 0, 0, 0, -1]).all()
        assert (np.diff(rows[:n, 5]) <= 0).all()


@pytest.fixture(scope="module")
def detector_and_onnx(small_model):
    detector = Detector(small_model).eval()
    return detector, export_detector(detector)


def _tamper(model: onnx.ModelProto, op_type: str, position: int, value: float) -> onnx.ModelProto:
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    name = next(n.input[position] for n in changed.graph.node if n.op_type == op_type)
    tensor = next(i for i in changed.graph.initializer if i.name == name)
    array = np.full_like(onnx.numpy_helper.to_array(tensor), value)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    return changed


def test_check_accepts_the_export(detector_and_onnx):
    agreement = compare_with_onnxruntime(*detector_and_onnx)
    assert agreement.detections > 0
    assert max(agreement.loc, agreement.conf) <= 1e-4


@pytest.mark.parametrize(
    ("op_type", "position", "value", "message"),
    [("Conv", 1, 0.01, "differ in"), ("NonMaxSuppression", 3, 0.9, "detection")],
)
def test_check_notices_a_wrong_graph(detector_and_onnx, op_type, position, value, message):
    detector, model = detector_and_onnx
    with pytest.raises(ExportError, match=message):
        compare_with_onnxruntime(detector, _tamper(model, op_type, position, value))


def test_checkpoint_round_trip(small_checkpoint, small_model):
    checkpoint = read_checkpoint(small_checkpoint)
    config = infer_config(checkpoint)
    assert config == small_model.config
    loaded = load_model(checkpoint, config).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in small_model.state_dict().items())

"""The proof of an export forgives what hangs on rounding, and nothing else."""

import zlib

import numpy as np
import onnx
import pytest
import torch

import export.agreement
import export.ssd_resnet34.postprocess
from export.agreement import compare_detections, compare_with_onnxruntime
from export.errors import ExportError
from export.onnx_export import (
    Detector,
    export_detector,
)
from export.ssd_resnet34.config import SSDConfig
from export.ssd_resnet34.model import SSDResNet34
from graph_surgery.rounding import NOTHING, compare


@pytest.fixture(scope="module")
def small(small_model):
    detector = Detector(small_model).eval()
    return detector, export_detector(detector)


def heads_of(config, seed):
    """Heads whose priors have the same logits in another order: only rounding tells scores apart.

    They come in twenty strengths, so that most scores do differ.
    """
    rng = np.random.default_rng(seed)
    shape = (2, config.num_classes, config.num_priors)
    logits = np.broadcast_to(rng.normal(0, 2, (config.num_classes, 1)), shape)
    strength = rng.choice(np.linspace(0.5, 2, 20), (2, 1, config.num_priors))
    conf = rng.permuted(logits, axis=1) * strength
    loc = rng.normal(0, 2, (2, 4, config.num_priors))
    return loc.astype(np.float32), conf.astype(np.float32)


def count_differences(monkeypatch):
    """Rows without an equal, were nothing undecided; filled while detections are compared."""
    counts = []

    def counted(first, second, doubtful):
        bare = compare(first, second, lambda: NOTHING)
        counts.append(len(bare.lacking) + len(bare.excess))
        return compare(first, second, doubtful)

    monkeypatch.setattr(export.agreement, "compare", counted)
    return counts


@pytest.mark.parametrize("seed", range(3))
def test_scores_that_only_rounding_tells_apart(small, monkeypatch, seed):
    """Both sides keep others of the equally good: the proof says so, and does not refuse."""
    detector, model = small
    counts = count_differences(monkeypatch)
    compare_detections(detector, model, *heads_of(detector.model.config, seed))
    assert sum(counts) > 0


def test_the_check_itself_has_such_scores(small, monkeypatch):
    counts = count_differences(monkeypatch)
    assert compare_with_onnxruntime(*small).detections > 0
    assert sum(counts) > 0


def tampered(model, position, value):
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    (name,) = (n.input[position] for n in changed.graph.node if n.op_type == "NonMaxSuppression")
    tensor = next(t for t in changed.graph.initializer if t.name == name)
    array = np.full_like(onnx.numpy_helper.to_array(tensor), value)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    return changed


@pytest.mark.parametrize(("position", "value"), [(3, 0.45), (3, 0.51), (4, 0.055), (4, 0.045)])
def test_the_check_notices_another_threshold(small, position, value):
    detector, model = small
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(detector, tampered(model, position, value))


def test_the_check_notices_another_rule_for_equal_scores(small, monkeypatch):
    stable_topk = export.ssd_resnet34.postprocess.stable_topk

    def later_first(values, k):
        top, index = stable_topk(values.flip(-1), k)
        return top, values.shape[-1] - 1 - index

    monkeypatch.setattr(export.ssd_resnet34.postprocess, "stable_topk", later_first)
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(*small)


def test_the_check_notices_one_shifted_box(small, monkeypatch):
    detector, model = small
    centre = detector.postprocess.centre.clone()
    centre[0, :40] += 1e-4
    monkeypatch.setattr(detector.postprocess, "centre", centre)
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(detector, model)


@pytest.mark.slow
def test_full_size_weights_whose_best_scores_are_close():
    """The 200th detection of an image is told from the next by rounding alone."""
    config = SSDConfig()
    model = SSDResNet34(config)
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            rng = np.random.RandomState(zlib.crc32(name.encode()))
            if name.endswith("running_var"):
                values = rng.uniform(0.5, 1.5, tensor.shape)
            elif name.endswith("running_mean"):
                values = rng.normal(0, 0.1, tensor.shape)
            elif tensor.dim() > 1:
                values = rng.normal(size=tensor.shape) * np.sqrt(1.6 / tensor[0].numel())
            elif name.endswith("weight"):
                values = rng.uniform(0.6, 1.0, tensor.shape)
            else:
                values = rng.normal(0, 0.05, tensor.shape)
            state[name] = torch.from_numpy(values.astype(np.float32))
    model.load_state_dict(state)
    detector = Detector(model.eval()).eval()
    assert compare_with_onnxruntime(detector, export_detector(detector)).detections > 400

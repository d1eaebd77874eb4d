"""The proof of an export forgives what hangs on rounding, and nothing else."""

import zlib

import numpy as np
import onnx
import pytest
import torch

import export.onnx_export
import export.postprocess
from export.config import SSDConfig
from export.errors import ExportError
from export.model import SSDResNet34
from export.onnx_export import (
    Detector,
    compare_detections,
    compare_with_onnxruntime,
    export_detector,
)
from export.rounding import NOTHING, Rules, Undecided, compare, undecided
from tests.support import ROOT

RULES = Rules(threshold=0.05, overlap=0.5, top_k=200, keep=200)


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

    monkeypatch.setattr(export.onnx_export, "compare", counted)
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
    stable_topk = export.postprocess.stable_topk

    def later_first(values, k):
        top, index = stable_topk(values.flip(-1), k)
        return top, values.shape[-1] - 1 - index

    monkeypatch.setattr(export.postprocess, "stable_topk", later_first)
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(*small)


def test_the_check_notices_one_shifted_box(small, monkeypatch):
    detector, model = small
    centre = detector.postprocess.centre.clone()
    centre[0, :40] += 1e-4
    monkeypatch.setattr(detector.postprocess, "centre", centre)
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(detector, model)


# Two lists of detections, by hand


def boxes_at(*lefts):
    """Boxes one high and wide, of which neighbours of lefts 0 and 1/3 overlap by half."""
    return np.array([[left, 0, left + 1, 1] for left in lefts], np.float64)


def undecided_priors(boxes, scores, same=None, rules=RULES):
    """Which boxes [n, 4] of one class hang on rounding, by their scores."""
    scores = np.array([scores], np.float64)
    same = np.arange(scores.size)[None] if same is None else np.array([same])
    return sorted(undecided(boxes, scores, same, rules).rows[:, 4].tolist(), reverse=True)


def test_a_score_at_the_threshold_is_undecided():
    scores = [0.9, 0.050009, 0.049991, 0.05002, 0.04998]
    assert undecided_priors(boxes_at(*range(0, 10, 2)), scores) == [0.050009, 0.049991]


def test_an_overlap_at_the_threshold_is_undecided():
    """So are those that the undecided box would suppress, but none behind a decided one."""
    third = 1 / 3  # boxes one wide, so far apart, overlap by one half
    assert undecided_priors(boxes_at(0, third), [0.9, 0.8]) == [0.8]
    assert undecided_priors(boxes_at(0, third - 1e-3), [0.9, 0.8]) == []
    assert undecided_priors(boxes_at(0, third + 1e-3), [0.9, 0.8]) == []
    assert undecided_priors(boxes_at(0, third, 0.5), [0.9, 0.8, 0.7]) == [0.8, 0.7]
    assert undecided_priors(boxes_at(0, third, 0.1), [0.9, 0.8, 0.7]) == [0.8]


def test_the_order_of_close_scores_is_undecided_but_not_of_equal_ones():
    boxes = boxes_at(0, 0.1)
    assert undecided_priors(boxes, [0.9, 0.9 - 1e-6]) == [0.9, 0.9 - 1e-6]
    assert undecided_priors(boxes, [0.9, 0.9 - 1e-4]) == []
    assert undecided_priors(boxes, [0.9, 0.9], same=[5, 5]) == []
    assert undecided_priors(boxes, [0.9, 0.9], same=[5, 6]) == [0.9, 0.9]


@pytest.mark.parametrize("cut", ["top_k", "keep"])
def test_the_last_that_counts_is_undecided(cut):
    boxes = boxes_at(0, 2, 4, 6)
    limits = {"top_k": 200, "keep": 200} | {cut: 2}
    rules = Rules(0.05, 0.5, **limits)
    assert undecided_priors(boxes, [0.9, 0.8, 0.7, 0.6], rules=rules) == []
    close = [0.9, 0.8, 0.8 - 1e-6, 0.6]
    assert undecided_priors(boxes, close, rules=rules) == [0.8, 0.8 - 1e-6]
    assert undecided_priors(boxes, [0.9, 0.8, 0.8, 0.6], [0, 1, 1, 2], rules) == []


ROWS = np.array([[0, 0, 1, 1, 0.9, 3], [2, 0, 3, 1, 0.9, 3], [4, 0, 5, 1, 0.5, 1]])


def nothing():
    return NOTHING


def the_first():
    """Whether the first of `ROWS` is there hangs on rounding."""
    return Undecided(ROWS[:1], 2, 3)


def test_equal_scores_have_one_order_and_close_ones_any():
    assert compare(ROWS, ROWS, nothing).faults == 0
    swapped = ROWS[[1, 0, 2]]
    assert len(compare(swapped, ROWS, nothing).disordered) == 1
    close = ROWS.copy()
    close[1, 4] -= 1e-6
    assert compare(swapped, close, nothing).faults == 0
    far = ROWS.copy()
    far[1, 4] -= 1e-3
    assert len(compare(far[[1, 0, 2]], far, nothing).disordered) > 0


def test_rows_without_an_equal_are_forgiven_one_for_one():
    short = ROWS[1:]
    assert compare(short, ROWS, nothing).lacking.tolist() == ROWS[:1].tolist()
    assert compare(ROWS, short, nothing).excess.tolist() == ROWS[:1].tolist()
    assert compare(ROWS, short, the_first).faults == 0
    assert compare(short, ROWS, the_first).faults == 0
    twice = np.concatenate([ROWS[:1], short])
    twice[1] = ROWS[0]
    assert len(compare(twice, short, the_first).excess) == 1
    moved = ROWS + np.array([1e-4, 0, 0, 0, 0, 0])
    assert len(compare(moved, ROWS, the_first).lacking) == 2
    assert len(compare(moved, ROWS, the_first).excess) == 3


def test_a_wrong_number_of_rows_is_never_forgiven():
    """The row that one side keeps too many is as good as the last that counts."""
    boxes = boxes_at(*range(0, 10, 2))
    scores = np.full((1, 5), 0.9) - np.arange(5) * 1e-6
    known = undecided(boxes, scores, np.arange(5)[None], Rules(0.05, 0.5, top_k=200, keep=3))
    assert (known.least, known.most, len(known.rows)) == (3, 3, 5)
    rows = np.column_stack([boxes.clip(0, 1)[:, [1, 0, 3, 2]], scores[0], np.zeros(5)])
    assert compare(rows[:3], rows[1:4], lambda: known).faults == 0
    assert compare(rows[:4], rows[:3], lambda: known).faults == 1
    assert compare(rows[:2], rows[:3], lambda: known).faults == 1


def test_the_surgery_has_the_same_rules():
    ours, theirs = (ROOT / package / "rounding.py" for package in ("export", "graph_surgery"))
    assert ours.read_text() == theirs.read_text()


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

"""The proof of a surgery forgives what hangs on rounding, and nothing else."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

import graph_surgery.replace
import graph_surgery.samples
from graph_surgery.errors import SurgeryError
from graph_surgery.replace import insert_nms
from graph_surgery.rounding import NOTHING, Rules, Undecided, compare, undecided
from tests.support.graphs import UNCAPPED, detector

RULES = Rules(threshold=0.05, overlap=0.5, top_k=200, keep=200)
MODEL = replace(UNCAPPED, opset=13, keep=200, overlap=0.5)


def written_out(variant) -> onnx.ModelProto:
    """A detector whose softmax is written out, and rounds otherwise than the operator does."""
    model = detector(variant)
    (node,) = (node for node in model.graph.node if node.op_type == "Softmax")
    place = list(model.graph.node).index(node)
    parts = [
        helper.make_node("Exp", node.input, ["powers"]),
        helper.make_node("ReduceSum", ["powers", "last"], ["sum"]),
        helper.make_node("Div", ["powers", "sum"], node.output),
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "last"))
    model.graph.node.remove(node)
    for part in reversed(parts):
        model.graph.node.insert(place, part)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def scores(monkeypatch):
    """Make the samples' scores from this function of the threshold, the count and a generator."""

    def use(make):
        def scores(tail, count, rng):
            made = make(tail.attributes.confidenceThreshold, count, rng)
            return np.clip(made, 1e-4, 1 - 1e-4)

        monkeypatch.setattr(graph_surgery.samples, "_scores", scores)

    return use


@pytest.mark.parametrize("seed", range(3))
def test_scores_at_the_threshold_prove_a_surgery(scores, seed):
    """Half of them are within rounding of it; some of these are detections of one side alone."""
    noise = np.random.default_rng(seed)

    def make(threshold, count, rng):
        near = threshold + noise.normal(0, 1e-8, count // 2)
        return rng.permutation(np.concatenate([near, noise.uniform(0.1, 0.9, count - count // 2)]))

    scores(make)
    assert insert_nms(written_out(MODEL)).modified


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [7, 25])
def test_scores_at_the_cut_prove_a_surgery(scores, seed, keep):
    """Rounding chooses the image's best, and which of two neighbours suppresses the other."""
    noise = np.random.default_rng(seed)
    scores(lambda _threshold, count, _rng: 0.7 + noise.normal(0, 3e-8, count))
    assert insert_nms(written_out(replace(MODEL, keep=keep))).modified


MISTAKES = {
    "IoU threshold": {"nmsThreshold": 0.45},
    "score threshold": {"confidenceThreshold": 0.0501},
    "keepTopK": {"keepTopK": 201},
}


@pytest.mark.parametrize("mistake", [*MISTAKES.values(), "shifted box"], ids=[*MISTAKES, "box"])
def test_small_mistakes_are_noticed(monkeypatch, mistake):
    find_tail = graph_surgery.replace.find_tail

    def find_wrongly(graph, model):
        tail = find_tail(graph, model)
        if mistake != "shifted box":
            return replace(tail, attributes=replace(tail.attributes, **mistake))
        priors = tail.priors.copy()
        priors[0].reshape(-1, 4)[::9, [0, 2]] += 1e-4
        return replace(tail, priors=priors)

    monkeypatch.setattr(graph_surgery.replace, "find_tail", find_wrongly)
    with pytest.raises(SurgeryError, match="disagree"):
        insert_nms(detector(MODEL))


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


def test_the_last_of_a_level_is_undecided():
    """Two of each level count, of all its classes together; the lower class comes first."""
    rules = Rules(0.05, 0.5, top_k=0, keep=200, level_top_k=2)
    apart = boxes_at(0, 2, 4, 6, 8)
    scores = np.array([[0.9, 0.0, 0.8, 0.9, 0.0], [0.0, 0.8, 0.0, 0.7, 0.6]])

    def found(scores, same=None):
        same = np.arange(10).reshape(2, 5) if same is None else same
        known = undecided(apart, scores, same, rules, levels=(3, 2))
        return [tuple(row) for row in known.rows[:, [4, 5]]], known.least, known.most

    # level 0: 0.9, then 0.8 of class 0 or of class 1; level 1: 0.9, then 0.7
    assert found(scores) == ([(0.8, 0), (0.8, 1)], 3, 5)
    tied = np.array([[1, 0, 2, 1, 0], [0, 2, 0, 3, 4]])
    assert found(scores, tied) == ([], 4, 4)


def test_an_overlap_within_the_image_is_undecided():
    boxes = np.array([[0.5, 0, 1.5, 1], [0.75, 0, 3, 1]])
    assert undecided_priors(boxes, [0.9, 0.8]) == []
    assert undecided_priors(boxes, [0.9, 0.8], rules=replace(RULES, clip=True)) == [0.8]


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

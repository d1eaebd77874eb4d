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
from tests.support.graphs import UNCAPPED, detector

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

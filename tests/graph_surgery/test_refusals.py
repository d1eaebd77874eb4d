"""Graph surgery refuses what it cannot prove to be the operator, and says why."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

import graph_surgery.replace
import graph_surgery.samples
from graph_surgery.errors import SurgeryError
from graph_surgery.nms_function import nms_function
from graph_surgery.replace import insert_nms
from tests.support import graphs
from tests.support.graphs import (
    UNCAPPED,
    VARIANTS,
    Variant,
    detector,
    nms_node,
)
from tests.support.nms_cases import with_attributes


def test_no_class_beside_the_background_is_refused(monkeypatch):
    monkeypatch.setattr(graphs, "CLASSES", 1)
    with pytest.raises(SurgeryError, match="0 classes beside the background"):
        insert_nms(detector(replace(UNCAPPED, opset=13)))


def test_a_dynamic_image_size_is_refused():
    model = detector(UNCAPPED)
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "size"
    del model.graph.value_info[:]
    with pytest.raises(SurgeryError, match="fixed image size"):
        insert_nms(model)


REFUSED = {
    "no NonMaxSuppression": (Variant(lacks="NonMaxSuppression"), "no NonMaxSuppression upstream"),
    "two": (Variant(nms_nodes=2), "2 NMS nodes"),
    "a head missing": (Variant(lacks="a loc head"), "2 and 3 heads: one is missing"),
    "ReLU behind a head": (Variant(lacks="a plain head"), "meets Relu"),
    "no last TopK": (Variant(lacks="TopK"), "no TopK"),
    "another sigmoid": (Variant(activation="HardSigmoid"), "softmax .* or their sigmoid"),
    "raw logits": (Variant(activation="Identity"), "softmax"),
    "no exponential": (Variant(encoding="linear"), "CENTER_SIZE"),
    "priors in another order than cells": (
        Variant(layout="anchor-first"),
        "priors do not lie on the grids of the heads; export with priors in the order of",
    ),
    "labels from 0": (Variant(label_offset=0), "disagree"),
    "made for one image": (Variant(batch="N"), "ONNX Runtime fails"),
    "no constant cap": (Variant(cap=0), "max_output_boxes_per_class"),
}


@pytest.mark.parametrize(("variant", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_is_missing(variant, message):
    model = detector(variant)
    before = model.SerializeToString()
    with pytest.raises(SurgeryError, match=message):
        insert_nms(model)
    assert model.SerializeToString() == before


TWISTS = {
    "large clamped": "no tensor behind the heads holds boxes",
    "small clamped": "no tensor behind the heads holds boxes",
    "clipped before": "disagree",
    "second threshold, far": "disagree",
    "second threshold, near": "disagree",
    "small dropped": "disagree",
    "large dropped": "disagree",
    "outside dropped": "disagree",
    "best class alone": "disagree",
    "ascending": "disagree",
    "later prior wins": "disagree",
}


@pytest.mark.slow
@pytest.mark.parametrize("twist", TWISTS)
@pytest.mark.parametrize("keep", [7, 25, 200])
def test_a_tail_that_does_something_else_is_refused(twist, keep):
    """Each differs from the operator on rare boxes and scores alone, or in the order of rows."""
    variant = replace(UNCAPPED, opset=13, keep=keep)
    assert insert_nms(detector(variant)).modified
    with pytest.raises(SurgeryError, match=TWISTS[twist]):
        insert_nms(detector(replace(variant, twist=twist)))


@pytest.mark.parametrize("seed", range(1, 7))
def test_the_proof_does_not_hang_on_one_seed(exported, monkeypatch, seed):
    """Rounding must not decide it: other head tensors prove the same surgeries."""
    rng = np.random.default_rng
    monkeypatch.setattr(graph_surgery.samples.np.random, "default_rng", lambda s: rng([s, seed]))
    for model in (
        onnx.load(exported),
        *(detector(VARIANTS[name]) for name in ("opset 10", "float16 network", "other numbers")),
        detector(replace(UNCAPPED, opset=13, threshold=0.0)),
    ):
        assert insert_nms(model).modified


MISTAKES = {
    "topK": {"topK": 150},
    "keepTopK": {"keepTopK": 199},
    "score threshold": {"confidenceThreshold": 0.3},
    "IoU threshold": {"nmsThreshold": 0.6},
    "background": {"backgroundLabelId": 1},
    "no background": {"backgroundLabelId": -1},
    "activation": {"confSigmoid": 1, "confSoftmax": 0},
}


@pytest.mark.parametrize("mistake", [*MISTAKES.values(), "priors"], ids=[*MISTAKES, "priors"])
def test_the_proof_notices_every_wrong_parameter(exported, monkeypatch, mistake):
    find_tail = graph_surgery.replace.find_tail

    def find_wrongly(graph, model):
        tail = find_tail(graph, model)
        if mistake == "priors":
            return replace(tail, priors=tail.priors * np.float32(1.001))
        return replace(tail, attributes=replace(tail.attributes, **mistake))

    monkeypatch.setattr(graph_surgery.replace, "find_tail", find_wrongly)
    with pytest.raises(SurgeryError, match="disagree"):
        insert_nms(onnx.load(exported))


def break_surgered(model: onnx.ModelProto, fault: str) -> None:
    node, (function,) = nms_node(model), model.functions
    (priors,) = (t for t in model.graph.initializer if t.name == node.input[-1])
    if fault == "no function":
        del model.functions[:]
    elif fault == "empty function":
        del function.node[:]
    elif fault == "another body":
        (nms,) = (part for part in function.node if part.op_type == "NonMaxSuppression")
        nms.input[3] = "score_threshold"
    elif fault == "another opset":
        model.opset_import[0].version += 1
    elif fault == "another number of levels":
        function.CopyFrom(nms_function(with_attributes([(1, 1, 1)] * 2), 18))
    elif fault == "no attributes":
        del node.attribute[:]
    elif fault == "attribute of another type":
        kept = [a for a in node.attribute if a.name != "topK"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("topK", "200")])
    elif fault == "attribute of another detector":
        next(a for a in node.attribute if a.name == "numClasses").i += 1
    elif fault == "too few inputs":
        del node.input[1:]
    elif fault == "short priors":
        short = onnx.numpy_helper.to_array(priors)[:, :-4]
        priors.CopyFrom(onnx.numpy_helper.from_array(short, priors.name))
    elif fault == "two nodes":
        second = model.graph.node.add()
        second.CopyFrom(node)
        second.output[:] = ["more", "more_count"]


BROKEN = {
    "no function": "not the function that defines it",
    "empty function": "not the operator's definition",
    "another body": "not the operator's definition",
    "another opset": "not the operator's definition for 3 levels and opset 19",
    "another number of levels": "not the operator's definition",
    "no attributes": "lacks these attributes.*: numClasses, topK",
    "attribute of another type": "another type: topK",
    "attribute of another detector": "its heads are of 5 classes",
    "too few inputs": "takes 6 head tensors and constant priors",
    "short priors": "its heads are of 5 classes and 184 priors",
    "two nodes": "2 NMS_OPT_TRT nodes",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_surgered_model_is_refused(fault):
    model = insert_nms(detector(UNCAPPED)).model
    assert not insert_nms(model).modified
    break_surgered(model, fault)
    with pytest.raises(SurgeryError, match=BROKEN[fault]):
        insert_nms(model)

"""`graph-surgery inspect` tells what is known of any ONNX file, and what a detector lacks."""

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, parser

from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from graph_surgery.inspect import read_tail
from graph_surgery.nms_function import plugin_only
from graph_surgery.replace import insert_nms
from graph_surgery.survey import survey
from tests.graph_surgery.test_cli import command
from tests.graph_surgery.test_pixels import in_units
from tests.support import calibrated
from tests.support.exporters import write
from tests.support.graphs import IMAGE, UNCAPPED, Variant, detector, nms_node
from tests.support.habits import REFUSED, Habits

PLAIN = replace(UNCAPPED, opset=18)
TAKEN = "a detector that 'graph-surgery nms' takes"
NOT_UNDERSTOOD = "a detector whose postprocessing is not understood"
WITHOUT = "a detector without NonMaxSuppression"
NONE = "no detector, as far as is seen"


def text(body: str, inputs: str, outputs: str) -> onnx.ModelProto:
    """A graph of opset 17 in ONNX's text format, with an operator domain of TensorRT's plugins."""
    head = '<ir_version:8, opset_import:["":17, "trt":1]>'
    return parser.parse_model(
        f"{head} g (float[1,3,8,8] image, {inputs}) => ({outputs}) {{{body}}}"
    )


CLASSIFIER = text(
    """a = Conv(image, w) b = Relu(a) c = Conv(b, w1) d = Conv(b, w2) e = Add(c, d)
    f = GlobalAveragePool(e) logits = Flatten(f)""",
    "float[12,3,1,1] w, float[12,12,1,1] w1, float[12,12,1,1] w2",
    "float[1,12] logits",
)
RAW = text(
    """loc = Conv(image, w) c = Conv(image, v) r = Reshape(c, s) conf = Transpose<perm=[0,2,1]>(r)
    """,
    "float[8,3,1,1] w, float[10,3,1,1] v, int64[3] s",
    "float[1,8,8,8] loc, float[1,128,5] conf",
)


def without_nms(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A detector with other nodes that make what its NonMaxSuppression made, [n, 3]."""
    nms = next(node for node in model.graph.node if node.op_type == "NonMaxSuppression")
    for place, node in enumerate(nodes):
        for names in (node.input, *(n.input for a in node.attribute for n in a.g.node)):
            names[:] = [nms.input[int(name[1:])] if name[0] == "#" else name for name in names]
        node.output[0] = nms.output[0] if place == len(nodes) - 1 else node.output[0]
        model.graph.node.insert(list(model.graph.node).index(nms), node)
    model.graph.node.remove(nms)
    return model


def of_an_engine() -> onnx.ModelProto:
    model = without_nms(
        detector(PLAIN), helper.make_node("EfficientNMS_TRT", ["#0", "#1"], [""], domain="trt")
    )
    model.opset_import.add(domain="trt", version=1)
    return model


def within_if() -> onnx.ModelProto:
    selected = [onnx.helper.make_tensor_value_info("selected", onnx.TensorProto.INT64, None)]
    nms = helper.make_node("NonMaxSuppression", [f"#{i}" for i in range(5)], ["selected"], "inner")
    branch = helper.make_graph([nms], "branch", [], selected)
    some = helper.make_node("Constant", [], ["some"], value=onnx.numpy_helper.from_array(np.True_))
    either = helper.make_node("If", ["some"], [""], then_branch=branch, else_branch=branch)
    return without_nms(detector(PLAIN), some, either)


def by_anchor() -> onnx.ModelProto:
    slots = {"channels": "anchor first", "priors": "by cell", "deltas": "dy, dx"}
    return write(Habits(**slots, softmax="Sigmoid", background="none"))


def broken() -> onnx.ModelProto:
    model = insert_nms(detector(PLAIN)).model
    node = nms_node(model)
    del node.attribute[:]
    return model


KNOWN = {
    "a detector": (
        lambda: detector(PLAIN),
        TAKEN,
        {
            "anchors": "184, 2, 3, 2 a cell; centres 0.0625 to 0.938, sides 0.2 to 0.75 of the "
            "image; variances 0.1, 0.1, 0.2, 0.2",
            "boxes": "CENTER_SIZE, decoded in fractions of the image as ltrb",
            "order": r"\[4 \* anchors\] of dx, dy, dw, dh, priors anchor by anchor",
            "scores": "softmax over 5 classes, class 0 the background",
            "suppression": "NonMaxSuppression .*, IoU above 0.45, scores above 0.05, at most 184",
        },
        [],
    ),
    "in pixels": (
        lambda: in_units(IMAGE, IMAGE),
        TAKEN,
        {"boxes": "pixels of 32 x 32", "anchors": "sides 0.2 to 0.75 of the image"},
        [],
    ),
    "in another order, by sigmoid": (
        by_anchor,
        TAKEN,
        {
            "order": r"\[anchors \* 4\] of dy, dx, dh, dw, priors cell by cell",
            "scores": "sigmoid of each of 5 classes, no background",
        },
        [],
    ),
    "surgered": (
        lambda: insert_nms(detector(PLAIN)).model,
        "a detector after its surgery: NMS_OPT_TRT$",
        {"scores": "softmax over 5 classes", "anchors": "184, 2, 3, 2 a cell"},
        [],
    ),
    "surgered, for the plugin": (
        lambda: plugin_only(insert_nms(detector(PLAIN)).model),
        "after its surgery: NMS_OPT_TRT without its definition, which only its plugin can run",
        {},
        [],
    ),
    "surgered and broken": (
        broken,
        "a detector after its surgery",
        {},
        ["lacks these attributes.*; start again from the model before its surgery"],
    ),
    "no NonMaxSuppression": (
        lambda: detector(replace(PLAIN, lacks="NonMaxSuppression", opset=13)),
        WITHOUT,
        {"scores": "softmax", "boxes": "CENTER_SIZE", "anchors": "184"},
        ["no NonMaxSuppression upstream of the outputs .*exported with its postprocessing"],
    ),
    "heads alone": (lambda: RAW, WITHOUT, {}, ["'loc' from Conv, 'conf' from Transpose"]),
    "two": (
        lambda: detector(replace(PLAIN, nms_nodes=2)),
        NOT_UNDERSTOOD,
        {
            "suppression": "at most 184 of a class; NonMax.*at most 184 of a class",
            "boxes": "as ltrb",
        },
        ["2 NMS nodes"],
    ),
    "an engine's operator": (
        of_an_engine,
        NOT_UNDERSTOOD,
        {"suppression": "EfficientNMS_TRT", "boxes": "as ltrb", "scores": "softmax"},
        ["nearest is EfficientNMS_TRT .* which is no operator of ONNX: .* one NonMaxSuppression"],
    ),
    "within If": (
        within_if,
        NOT_UNDERSTOOD,
        {"suppression": "NonMaxSuppression 'inner', IoU above 0.45", "boxes": "as ltrb"},
        ["nearest is NonMaxSuppression 'inner', within If or Loop"],
    ),
    "other boxes": (
        lambda: detector(replace(PLAIN, encoding="linear")),
        NOT_UNDERSTOOD,
        {"scores": "softmax over 5 classes", "kept": "25 detections of an image"},
        ["CENTER_SIZE .* nearest is .* export with"],
    ),
    "other scores": (
        lambda: detector(replace(PLAIN, activation="HardSigmoid")),
        NOT_UNDERSTOOD,
        {"boxes": "as ltrb", "anchors": "184"},
        ["the softmax of the logits over 5 classes, or their sigmoid.* nearest differs .* export"],
    ),
    "other boxes and scores": (
        lambda: detector(replace(PLAIN, encoding="linear", activation="HardSigmoid", lacks="TopK")),
        NOT_UNDERSTOOD,
        {"suppression": "IoU above 0.45"},
        ["CENTER_SIZE", "or their sigmoid", "no TopK with a constant bound"],
    ),
    "a classifier": (
        lambda: CLASSIFIER,
        NONE,
        {},
        ["no NonMaxSuppression .*'logits' from Flatten"],
    ),
    "no convolution": (
        lambda: text("y = Relu(image)", "float x", "float[1,3,8,8] y"),
        NONE,
        {"input image": r"float32 \[1, 3, 8, 8\]", "nodes": "1, 0 Conv, opset 17"},
        ["'y' from Relu"],
    ),
    "sequences": (
        lambda: text("y = Identity(x)", "seq(float[N]) x", "seq(float[N]) y"),
        NONE,
        {"input x": "sequence"},
        ["'y' from Identity"],
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_and_what_is_missing(name):
    make, kind, facts, missing = KNOWN[name]
    known = survey(make())
    assert re.search(kind, known.facts["kind"])
    for what, value in facts.items():
        assert re.search(value, known.facts[what]), known.facts[what]
    assert len(known.missing) == len(missing), known.missing
    for line, expected in zip(known.missing, missing, strict=True):
        assert re.search(expected, line), line
        assert "\n" not in line
    assert (known.heads is None) == (kind == NONE or name == "surgered and broken")


@pytest.mark.parametrize(
    ("names", "shown"),
    [('["stop sign", "dog"]', "2: stop sign, dog"), ("[]", None), ('"dog"', None), (None, None)],
)
def test_class_names_in_the_order_of_the_labels(names, shown):
    model = detector(PLAIN)
    helper.set_model_props(model, {} if names is None else {"class_names": names})
    assert survey(model).facts.get("class names") == shown


@pytest.mark.parametrize(("slot", "form"), REFUSED)
def test_a_form_without_equal_says_what_the_refusal_says(slot, form):
    """Labels show in the proof alone."""
    known = survey(write(replace(Habits(), **{slot: form})))
    if slot == "label":
        assert known.facts["kind"].startswith(TAKEN)
    else:
        (line,) = known.missing
        assert REFUSED[slot, form] in line


def test_a_quantised_file(tmp_path):
    model = insert_nms(write(Habits(opset=18))).model
    onnx.save(model, tmp_path / "model.onnx")
    images = np.random.default_rng(0).normal(size=(2, 3, IMAGE, IMAGE)).astype(np.float32)
    data = calibrated.write_images(tmp_path, images)
    int8 = quantize(model, calibrate(load_detector(tmp_path / "model.onnx"), data, method="minmax"))
    known = survey(int8)
    kinds = [node.op_type for node in int8.graph.node]
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        assert f"{kinds.count(kind)} {kind}" in known.facts["quantised"]
    assert known.facts["input image"] == "int8 [batch, 3, 32, 32]"
    assert known.tail is not None
    assert known.tail.heads == read_tail(model)[0].heads


@pytest.mark.parametrize(("opset", "of_function"), [(18, 18), (18, 13), (11, 18)])
def test_functions_are_looked_through(opset, of_function):
    """A graph that the surgery takes is not called unknown for them."""
    model = detector(replace(UNCAPPED, opset=opset))
    model.ir_version = 8
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    body = [helper.make_node("Softmax", ["x"], ["y"], axis=2)]
    opsets = [helper.make_opsetid("", of_function)]
    model.functions.append(helper.make_function("own", "Scores", ["x"], ["y"], body, opsets))
    model.opset_import.add(domain="own", version=1)
    softmax.op_type, softmax.domain = "Scores", "own"
    del softmax.attribute[:]
    assert survey(model).facts["kind"].startswith(TAKEN)
    assert "the model's functions were inlined" in insert_nms(model).changes


def test_the_command_shows_it_and_ends_with_0(tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.onnx"
    monkeypatch.setenv("COLUMNS", "200")
    onnx.save(detector(Variant(encoding="linear")), path)
    code, out, err = command(monkeypatch, capsys, "inspect", path)
    assert (code, err) == (0, "")
    assert "8 x 8" in out
    assert "softmax over 5 classes, class 0 the background" in out
    (line,) = [line for line in out.splitlines() if line.startswith("not understood: ")]
    assert "CENTER_SIZE" in line
    onnx.save(CLASSIFIER, path)
    code, out, err = command(monkeypatch, capsys, "inspect", path)
    assert (code, err) == (0, "")
    assert NONE in out

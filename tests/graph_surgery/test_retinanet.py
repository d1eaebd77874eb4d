"""The surgery on RetinaNets: torchvision's own exports, and graphs like the official one."""

from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engine.protocol import InputSpec
from graph_surgery.errors import SurgeryError
from graph_surgery.files import load
from graph_surgery.inspect import read_tail
from graph_surgery.pattern import find_tail
from graph_surgery.replace import insert_nms
from graph_surgery.survey import survey
from harness.data.transform import transform
from tests.support.graphs import nms_node
from tests.support.retina_graphs import ANCHORS, Retina, retina
from tests.support.retinanet_golden import anchor_priors, check_golden, retinanet_attributes

THROUGH_A_NETWORK = 1e-5
"""Of a score: the data's README has 3.2e-6 between ONNX Runtime and PyTorch."""


@pytest.fixture(scope="module", params=["torchvision_small.onnx", "torchvision_small_dynamo.onnx"])
def exported(request, golden):
    path = golden / "retinanet" / request.param
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    return insert_nms(load(path))


def preprocessed(images: np.ndarray) -> np.ndarray:
    """What `harness preprocess` makes of RGB images uint8 [N, 3, H, W]; files hold BGR."""
    made = np.empty(images.shape, np.float32)
    spec = InputSpec("images", images.shape[1:], "float32")
    for image, out in zip(images, made, strict=True):
        transform(np.ascontiguousarray(image[::-1].transpose(1, 2, 0)), spec, out)
    return made


def run(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def test_torchvision_detections_are_the_same(exported, golden):
    """Three images, in a batch that was one, as PyTorch has them of images / 255, not exported."""
    data = np.load(golden / "retinanet" / "torchvision_small.npz")
    images = preprocessed(data["images_u8"])
    detections, count = run(exported.model, images)
    for i, (rows, used) in enumerate(zip(detections, count, strict=True)):
        expected = tuple(data[f"eager_{what}_{i}"] for what in ("boxes", "scores", "labels"))
        check_golden(rows[:used], expected, (256, 256), score=THROUGH_A_NETWORK)


def test_what_is_found_in_torchvisions_exports(exported, golden):
    tail, surgered = read_tail(exported.model)
    assert surgered
    assert asdict(tail.attributes) == {
        name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
        for name, value in asdict(retinanet_attributes(12)).items()
    }
    levels = [(level.anchors, level.height, level.width) for level in tail.heads.levels]
    assert levels == [(9, size, size) for size in (32, 16, 8, 4, 2)]
    np.testing.assert_allclose(tail.priors, anchor_priors(golden, (256, 256), levels), atol=1e-6)
    said = "\n".join(exported.changes)
    for part in (
        "boxes were decoded and given in pixels of 256 x 256",
        "the 1000 best of each level's scores above 0.05 enter suppression",
        "dw and dh are at most 4.13517",
        "an offset of their boxes, which rounds them",
        "the batch, fixed at 1, became dynamic",
        "normalised its images itself, by ImageNet's mean and deviation of pixels in 0..1: taken",
    ):
        assert part in said


KINDS = {
    "the official file's form": Retina(),
    "scores of each class, fractions": Retina(offset=False, pixels=False),
    "other numbers": Retina(
        height=64, width=96, classes=3, most=17, keep=11, threshold=0.3, overlap=0.6, bound=0.7
    ),
    "no bound, no clip": Retina(bound=0.0, clip=False, offset=False),
    "variances": Retina(variances=(0.1, 0.2), bound=0.9),
    "one class": Retina(classes=1),
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_same_and_attributes_are_those_of_the_graph(name):
    kind = KINDS[name]
    old = retina(kind)
    new = insert_nms(old).model
    onnx.checker.check_model(new, full_check=True)
    images = np.random.default_rng(7).normal(size=(4, 3, kind.height, kind.width))
    images = images.astype(np.float32) * np.float32([0.05, 0.1, 0.15, 0.2])[:, None, None, None]
    detections, count = run(new, images)
    scale = [kind.width, kind.height] * 2 if kind.pixels else [1] * 4
    for image, rows, used in zip(images, detections, count, strict=True):
        boxes, scores, labels = run(old, image[None])
        expected = np.column_stack([(boxes / scale).clip(0, 1), scores, labels])
        assert len(expected) > 3
        actual = rows[:used, [2, 1, 4, 3, 5, 6]]
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    attributes = read_tail(new)[0].attributes
    found = asdict(attributes)
    assert {
        "numClasses": kind.classes,
        "levelTopK": kind.most,
        "topK": 3 * kind.most,
        "keepTopK": kind.keep,
        "clipBeforeNms": int(kind.clip),
        "confSigmoid": 1,
        "backgroundLabelId": -1,
    }.items() <= found.items()
    for attribute, value in (
        ("confidenceThreshold", kind.threshold),
        ("nmsThreshold", kind.overlap),
        ("bboxXformClip", kind.bound),
    ):
        assert found[attribute] == pytest.approx(value, abs=1e-6), attribute


def test_anchors_are_those_of_the_graph():
    kind = Retina()
    tail, _ = read_tail(insert_nms(retina(kind)).model)
    ltrb, variances = tail.priors.reshape(2, -1, 4)
    expected = [
        part.reshape(-1, ANCHORS, 4).transpose(1, 0, 2).reshape(-1, 4) for part in kind.anchors()
    ]
    scale = np.tile([kind.width, kind.height], 2)
    np.testing.assert_allclose(ltrb, np.concatenate(expected) / scale, atol=1e-6)
    assert (variances == 1).all()


def test_weights_that_levels_share_stay_one():
    """Heads' filters are put in order once, and of five uses there is one constant."""
    new = insert_nms(retina()).model
    made = {name: node for node in new.graph.node for name in node.output}
    heads = [made[name] for name in nms_node(new).input[:-1]]
    assert Counter(head.input[1] for head in heads).most_common() == [
        (heads[0].input[1], 3),
        (heads[3].input[1], 3),
    ]
    assert Counter(head.input[2] for head in heads).most_common(1)[0][1] == 3


def test_a_file_after_its_surgery_is_left():
    once = insert_nms(retina())
    twice = insert_nms(once.model)
    assert not twice.modified
    assert twice.model is once.model


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Retina(twist="other scores"), "the sigmoids of their logits"),
        (Retina(twist="bounded below"), "CENTER_SIZE; nearest is .* do not shrink"),
        (Retina(twist="small boxes dropped"), "come in|sigmoid|disagree"),
        (Retina(label=1), "disagree on labels alone"),
        (Retina(keep=10**6), "how many an image keeps is not known"),
        (Retina(each=(50, 40, 30)), "50, 40, 30 come in: .* to the same number"),
        (Retina(classes=4, each=(50, 40, 30)), "50, 40, 30 come in: .* to the same number"),
        (Retina(each=(40, 40, 90)), "40, 40, 90 come in: .* to the same number"),
        (Retina(most_of_all=90), "all together 90 and not 120: .* no cut over all levels"),
    ],
    ids=lambda one: one.twist or repr(one) if isinstance(one, Retina) else "",
)
def test_what_the_operator_does_not_do_is_refused(kind, said):
    with pytest.raises(SurgeryError, match=said):
        insert_nms(retina(kind))


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (Retina(each=(50, 40, 30)), 40),
        (Retina(each=(40, 40, 41)), 40),
        (Retina(most_of_all=90), 30),
        (Retina(most_of_all=119), 40),
        (Retina(), 39),
        (Retina(), 41),
        (Retina(classes=1, most=70), 71),  # of levels of 288, 72 and 18
        (Retina(classes=1, most=71), 70),
        (Retina(most=12, keep=10), 11),
        (Retina(keep=10), 41),
    ],
    ids=repr,
)
def test_the_proof_alone_sees_another_cut(kind, read, monkeypatch):
    """Whatever was measured before: on some image of the proof the cut decides over rows."""

    def misread(graph, model):
        tail = find_tail(graph, model)
        levels = len(tail.heads.levels)
        attributes = replace(tail.attributes, levelTopK=read, topK=levels * read)
        return replace(tail, attributes=attributes)

    monkeypatch.setattr("graph_surgery.levels._cut", lambda _: min(read, kind.most))
    monkeypatch.setattr("graph_surgery.replace.find_tail", misread)
    with pytest.raises(SurgeryError, match="disagree on the same head tensors"):
        insert_nms(retina(kind))


@pytest.mark.parametrize("surgered", [False, True])
def test_inspect_tells_what_it_found(surgered):
    model = retina()
    facts = survey(insert_nms(model).model if surgered else model).facts
    assert facts["version 2"] == (
        "the 40 best of each level enter suppression; boxes clipped to the image before "
        "suppression; dw and dh bounded by 1.25"
    )
    assert facts["anchors"].startswith("378, 3, 3, 3 a cell")


def test_what_does_not_say_its_detector_is_a_retinanet(exported):
    """Else its runs would be called by another's name, and judged on another data set."""
    metadata = exported.model.metadata_props
    assert {entry.key: entry.value for entry in metadata}["detector"] == "retinanet"


@pytest.mark.parametrize("damage", ["levelTopK", "plugin_version"])
def test_attributes_of_ours_that_are_not_whole_are_refused(damage):
    model = insert_nms(retina()).model
    node = nms_node(model)
    (found,) = (one for one in node.attribute if one.name == damage)
    if damage == "plugin_version":
        found.s = b"1"
    else:
        node.attribute.remove(found)
    said = "is not the operator's definition" if damage == "plugin_version" else "levelTopK"
    with pytest.raises(SurgeryError, match=said):
        insert_nms(model)

"""Graph surgery: the surgered graph says what the graph before it said."""

import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

from graph_surgery.nms_function import DOMAIN
from graph_surgery.replace import insert_nms
from tests.support import graphs
from tests.support.graphs import (
    IMAGE,
    UNCAPPED,
    VARIANTS,
    Variant,
    assert_same_detections,
    attributes_of,
    detector,
    grid_priors,
    nms_node,
    priors_of,
    rows_of_three,
    run,
)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_graph_like_the_published_one(variant):
    model = detector(variant)
    result = insert_nms(model)
    assert result.modified
    onnx.checker.check_model(result.model, full_check=True)
    order = (0, 1, 2, 3) if variant.yxyx else (1, 0, 3, 2)
    found = 0
    for seed in range(4):
        image = np.random.default_rng(seed).normal(size=(1, 3, IMAGE, IMAGE)).astype(np.float32)
        expected = rows_of_three(*run(model, {"image": image}), order)
        detections, count = run(result.model, {"image": image})
        assert detections.shape == (1, variant.keep, 7)
        assert_same_detections(detections[0, : count[0], 1:], expected)
        found += count[0]
    assert found > 4
    values = attributes_of(result.model)
    assert values["keepTopK"] == variant.keep
    assert values["confidenceThreshold"] == np.float32(variant.threshold)
    assert values["nmsThreshold"] == np.float32(variant.overlap)
    assert values["backgroundLabelId"] == 0
    assert values["numClasses"] == 5
    centre, size = np.split(grid_priors(), 2, axis=1)
    corners, variances = priors_of(result.model).reshape(2, -1, 4)
    np.testing.assert_allclose(
        corners, np.hstack([centre - size / 2, centre + size / 2]), atol=1e-6
    )
    assert (variances == np.float32([0.1, 0.1, 0.2, 0.2])).all()


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
def test_any_number_of_classes(monkeypatch, classes):
    """With four classes, conf heads have the shape of loc heads: experiment tells them apart."""
    monkeypatch.setattr(graphs, "CLASSES", classes)
    model = detector(replace(UNCAPPED, opset=13))
    new = insert_nms(model).model
    assert attributes_of(new)["numClasses"] == classes
    image = np.random.default_rng(0).normal(size=(1, 3, IMAGE, IMAGE)).astype(np.float32)
    detections, count = run(new, {"image": image})
    expected = rows_of_three(*run(model, {"image": image}))
    assert_same_detections(detections[0, : count[0], 1:], expected)


def test_a_cap_after_suppression_is_reported():
    """Where it can cut, topK takes its number, and the report says what that changes."""
    capped = insert_nms(detector(Variant(cap=60)))
    assert attributes_of(capped.model)["topK"] == 60
    assert any("after suppression" in change for change in capped.changes)
    uncapped = insert_nms(detector(UNCAPPED))
    assert not any("after suppression" in change for change in uncapped.changes)


def test_the_opset_conversion_is_reported():
    assert any("opset 10 became 18" in change for change in insert_nms(detector(UNCAPPED)).changes)


def legacy_export(model, batch: int | None) -> onnx.ModelProto:
    """The same detector through PyTorch's TorchScript exporter."""
    import io

    import torch

    from export.onnx_export import Detector

    def topk(g, values, k):
        k = g.op(
            "Constant", value_t=torch.tensor([torch.onnx.symbolic_helper._get_const(k, "i", "k")])
        )
        return g.op("TopK", values, k, axis_i=-1, outputs=2)

    def nms(g, boxes, scores, overlap, threshold):
        def number(value):
            value = torch.onnx.symbolic_helper._get_const(value, "f", "threshold")
            return g.op("Constant", value_t=torch.tensor([value], dtype=torch.float32))

        def integers(*values):
            return g.op("Constant", value_t=torch.tensor(values))

        shape = g.op("Shape", scores)
        selected = g.op(
            "NonMaxSuppression",
            boxes,
            scores,
            g.op("Gather", shape, integers(2)),
            number(overlap),
            number(threshold),
        )
        ones = g.op("Expand", integers(1), g.op("Shape", selected, start_i=0, end_i=1))
        kept = g.op("ScatterND", g.op("Expand", integers(0), shape), selected, ones)
        return g.op("Cast", kept, to_i=onnx.TensorProto.BOOL)

    torch.onnx.register_custom_op_symbolic("detectors::stable_topk", topk, 17)
    torch.onnx.register_custom_op_symbolic("detectors::greedy_nms", nms, 17)
    file = io.BytesIO()
    size = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Detector(model).eval(),
            (torch.zeros(batch or 2, 3, size, size),),
            file,
            input_names=["image"],
            output_names=["detections", "num_detections"],
            dynamic_axes=None if batch else {"image": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    exported = onnx.load_from_string(file.getvalue())
    del exported.graph.output[2:]
    return exported


@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript", "TorchScript, fixed batch"])
def test_our_export(exported, small_model, small_images, exporter):
    """Row for row and in order: both sides take the same numbers through the same operators."""
    if exporter == "torch.export":
        model = onnx.load(exported)
    else:
        model = legacy_export(small_model, 3 if "fixed" in exporter else None)
    result = insert_nms(model)
    for batch in (3,) if "fixed" in exporter else (1, 3):
        feeds = {"image": small_images[:batch]}
        expected, expected_count = run(model, feeds)
        detections, count = run(result.model, feeds)
        assert count.tolist() == expected_count.tolist()
        assert count.min() > 0
        np.testing.assert_allclose(detections, expected, atol=1e-5)
    detections, count = run(result.model, {"image": small_images[:1]})
    assert detections.shape == (1, 200, 7)
    dims = [value.type.tensor_type.shape.dim[0] for value in result.model.graph.output]
    assert all(dim.dim_param for dim in dims)
    inputs = nms_node(result.model).input
    producer = {name: node for node in result.model.graph.node for name in node.output}
    assert [producer[name].op_type for name in inputs[:-1]] == ["Conv"] * 12


def test_golden_detections_before_and_after(golden):
    """The full-size postprocessing behind a narrow network, fed with the golden head tensors."""
    from export.onnx_export import Detector, export_detector, without_heads
    from export.ssd_resnet34.config import SSDConfig
    from export.ssd_resnet34.model import SSDResNet34

    model = without_heads(export_detector(Detector(SSDResNet34(SSDConfig(width=2))).eval()))
    new = insert_nms(model).model
    heads = list(nms_node(new).input[:-1])
    outputs = ["detections", "num_detections"]
    cases = [np.load(golden / f"nms_{i}.npz") for i in (1, 2, 3)]
    grids = [(4, 50), (6, 25), (6, 13), (6, 7), (4, 3), (4, 3)]
    ends = np.cumsum([a * g * g for a, g in grids])[:-1]
    parts = [
        part.reshape(len(cases), -1, grid, grid)
        for kind in ("loc", "conf")
        for part, (_, grid) in zip(
            np.split(np.stack([case[kind] for case in cases]).astype(np.float32), ends, axis=2),
            grids,
            strict=True,
        )
    ]
    feeds = dict(zip(heads, parts, strict=True))
    results = []
    for whole in (model, new):
        extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(whole))
        image = [v.name for v in whole.graph.input]
        part = extractor.extract_model([*heads, *image], outputs)
        images = np.zeros((len(cases), 3, 1200, 1200), np.float32)  # for its batch size alone
        results.append(run(part, feeds | {image[0]: images}))
    for detections, count in results:
        for rows, used, case in zip(detections, count, cases, strict=True):
            assert rows[:used, 6].tolist() == case["labels"].tolist()
            np.testing.assert_allclose(rows[:used, 5], case["scores"], atol=1e-5)
            boxes = case["boxes_ltrb"].clip(0, 1)[:, [1, 0, 3, 2]]
            np.testing.assert_allclose(rows[:used, 1:5], boxes, atol=1e-5)
    np.testing.assert_allclose(results[1][0], results[0][0], atol=1e-6)
    boxes = np.load(golden / "default_boxes.npz")["ltrb"]
    np.testing.assert_allclose(priors_of(new)[0].reshape(-1, 4), boxes, atol=1e-6)


def scramble(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Give every tensor and node a meaningless name."""
    rng = np.random.default_rng(seed)
    model = onnx.ModelProto.FromString(model.SerializeToString())
    names: dict[str, str] = {"": ""}
    graph = model.graph

    def new(name: str) -> str:
        return names.setdefault(name, f"x{rng.integers(2**62)}")

    for node in graph.node:
        node.name = f"x{rng.integers(2**62)}"
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = new(value.name)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_names_mean_nothing(exported, seed):
    for model in (onnx.load(exported), detector(Variant(opset=11), seed)):
        plain, scrambled = insert_nms(model), insert_nms(scramble(model, seed))
        assert attributes_of(plain.model) == attributes_of(scrambled.model)
        assert (priors_of(plain.model) == priors_of(scrambled.model)).all()
        kinds = [[node.op_type for node in r.model.graph.node] for r in (plain, scrambled)]
        assert kinds[0] == kinds[1]


def test_a_second_surgery_changes_nothing(exported):
    first = insert_nms(onnx.load(exported))
    before = first.model.SerializeToString()
    second = insert_nms(first.model)
    assert not second.modified
    assert second.model.SerializeToString() == before
    assert "nothing to do" in second.changes[0]


def test_the_rest_of_the_model_is_kept(exported):
    model = onnx.load(exported)
    new = insert_nms(model).model
    assert new.metadata_props == model.metadata_props
    assert new.graph.input == model.graph.input
    assert [o.name for o in new.graph.output] == ["detections", "num_detections"]
    assert [(o.domain, o.version) for o in new.opset_import] == [("", 18), (DOMAIN, 1)]
    *kept, nms = new.graph.node
    made = {name for node in kept for name in node.output}
    assert made.issuperset(nms.input[:-1])
    assert kept == [node for node in model.graph.node if made.intersection(node.output)]
    assert {node.op_type for node in kept} == {"Conv", "Relu", "Add", "MaxPool"}
    read = {name for node in new.graph.node for name in node.input}
    stored = [t for t in model.graph.initializer if t.name in read]
    assert list(new.graph.initializer)[:-1] == stored
    assert {v.name for v in new.graph.value_info} <= read


@pytest.mark.parametrize("opset", [13, 18])
def test_what_the_model_says_of_itself_is_kept(opset):
    model = detector(replace(UNCAPPED, norms=True, opset=opset))
    model.doc_string, model.domain, model.model_version = "why", "whose", 7
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.metadata_props.add(key="layer", value="first")
    conv.doc_string = "the first layer"
    new = insert_nms(model).model
    for name in ("producer_name", "doc_string", "domain", "model_version", "metadata_props"):
        assert getattr(new, name) == getattr(model, name)
    first = new.graph.node[0]
    assert (first.metadata_props, first.doc_string) == (conv.metadata_props, conv.doc_string)


def test_other_outputs_are_kept():
    """A graph that also gives out a feature map and a head tensor still does."""
    model = detector(UNCAPPED)
    convs = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    extra = [convs[1], convs[-1]]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in extra
    )
    model = onnx.shape_inference.infer_shapes(model)
    new = insert_nms(model).model
    assert [o.name for o in new.graph.output] == ["detections", "num_detections", *extra]
    feeds = {"image": np.ones((1, 3, IMAGE, IMAGE), np.float32)}
    for a, b in zip(run(model, feeds)[3:], run(new, feeds)[2:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

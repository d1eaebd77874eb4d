"""Graphs as exporters write them: the same rows after the surgery and, quantised, those of NumPy.

`test_any_forms` draws from the whole grammar, always the same graphs; with FORMS_EXAMPLES=500 in
the environment it draws so many others.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.data.preprocessed import MEAN, STD
from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from graph_surgery.errors import SurgeryError
from graph_surgery.replace import insert_nms
from tests.support import calibrated, int8_simulation
from tests.support.exporters import KEEP, feeds, rows, write
from tests.support.graphs import IMAGE, assert_same_detections, nms_node, run
from tests.support.habits import FORMS, MUST, REFUSED, Habits

RNG = np.random.default_rng(4)
IMAGES = RNG.normal(size=(3, 1, 3, IMAGE, IMAGE)).astype(np.float32)
PIXELS = RNG.integers(-127, 128, (1, 3, IMAGE, IMAGE)).astype(np.int8)

EXPORTERS = {
    "TorchScript": Habits(opset=11, norm="plain", block="residual", decode="Slice"),
    "torch.export": Habits(
        opset=18, flat="constant", softmax="axis 1", block="residual", beside="features"
    ),
    "tf2onnx": Habits(
        opset=15,
        active="Clip",
        block="depthwise",
        weights="Constant",
        flat="NHWC",
        softmax="2-D",
        decode="Gather",
        corners="yxyx",
        column="Slice",
        label="int32",
    ),
    "TensorFlow's Object Detection API": Habits(
        opset=13,
        image="NHWC",
        channels="anchor first",
        priors="by cell",
        deltas="dy, dx",
        softmax="Sigmoid",
        decode="one scale",
        corners="yxyx",
    ),
    "Keras, labels from a table": Habits(
        opset=13, norm="behind Identity", background="Gather", column="Split", label="table"
    ),
    "PaddlePaddle": Habits(
        opset=12,
        stem="normalised",
        norm="plain",
        flat="zero",
        decode="Div",
        background="Split",
        keep="Min",
        beside="scalar",
    ),
    "mmdetection": Habits(
        opset=17, flat="rows", softmax="LogSoftmax", decode="one scale", score="GatherND"
    ),
    "torchvision": Habits(opset=17, flat="nested", softmax="written out", output="flat"),
    "boxes by their centres": Habits(
        opset=21, corners="centre", decode="premultiplied", output="flat", keep="Min"
    ),
    "one level": Habits(
        opset=23, levels=1, active="LeakyRelu", block="MaxPool", flat="Flatten", decode="Pow"
    ),
    "shared heads, a masked background": Habits(
        opset=13, weights="shared", background="masked", beside="NonZero", active="PRelu"
    ),
    "torchvision's batched_nms": Habits(opset=17, nms="batched", output="flat"),
    "RetinaNet": Habits(
        opset=13,
        channels="anchor first",
        priors="by cell",
        softmax="Sigmoid",
        background="none",
        weights="shared",
    ),
}
"""Thirteen detectors, one of which says what NMS_OPT_TRT cannot."""


COMING = {slot: [form for form in FORMS[slot] if (slot, form) in MUST] for slot in FORMS}
"""Slots, and the forms that must come through."""


def assert_same_rows(actual: np.ndarray, expected: np.ndarray) -> int:
    """All but those that the cut at `KEEP` takes or leaves by rounding; how many they are."""
    assert len(actual) == len(expected)
    last = expected[-1, 4] + 1e-5 if len(expected) == KEEP else -1
    one, other = (part[part[:, 4] > last] for part in (actual, expected))
    assert_same_detections(one, other)
    return len(other)


def check(model: onnx.ModelProto, habits: Habits, folder) -> None:
    """Rows before and after the surgery, and of the INT8 graph and its simulation."""
    new = insert_nms(model).model
    onnx.checker.check_model(new, full_check=True)
    found = 0
    for image in IMAGES:
        fed = image
        if habits.stem == "normalised":
            mean, deviation = (np.float32(one)[:, None, None] for one in (MEAN, STD))
            fed = image * deviation + mean
        expected = rows(run(model, feeds(model, fed)), habits)
        detections, count = run(new, feeds(new, image))[:2]
        found += assert_same_rows(detections[0, : count[0], 1:], expected)
    assert found > 0
    onnx.save(new, folder / "model.onnx")
    images = calibrated.write_images(folder, IMAGES[:, 0])
    calibration = calibrate(load_detector(folder / "model.onnx"), images, method="minmax")
    assert_int8(new, quantize(new, calibration), calibration)


def assert_int8(model: onnx.ModelProto, quantized: onnx.ModelProto, calibration) -> None:
    """ONNX Runtime, which runs the file node by node, gives what NumPy does."""
    made = {name: node for node in quantized.graph.node for name in node.output}
    convolutions = [node for node in quantized.graph.node if node.op_type == "Conv"]
    read = {made[name].op_type for node in convolutions for name in node.input[:2]}
    assert read == {"DequantizeLinear"}
    given = quantized.graph.input[0].type.tensor_type.elem_type
    image = PIXELS if given == onnx.TensorProto.INT8 else IMAGES[0]
    steps = [n for n in made if made[n].op_type == "QuantizeLinear" and made[n].input[0] in made]
    names = ["detections", "num_detections", *nms_node(quantized).input[:-1], *steps]
    values = calibrated.run(quantized, image, names, optimise=False)
    detections, count, *heads = values[: -len(steps) or None]
    told = {made[name].input[0]: v for name, v in zip(steps, values[-len(steps) :], strict=True)}
    expected = int8_simulation.heads(model, calibration, image, told)
    for one, other in zip(heads, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.ptp(other))
    rows_of_numpy = int8_simulation.rows(model, expected)[0]
    assert assert_same_rows(detections[0, : count[0], 1:], rows_of_numpy)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTERS)
def test_exporters(name, tmp_path):
    habits = EXPORTERS[name]
    model = write(habits)
    if habits.refused:
        with pytest.raises(SurgeryError, match="|".join(habits.refused)):
            insert_nms(model)
    else:
        check(model, habits, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(max(map(len, FORMS.values()))))
def test_every_form_comes_through(number, tmp_path):
    """So many graphs that each form stands in one of them."""
    habits = Habits(**{slot: known[number % len(known)] for slot, known in COMING.items()})
    check(write(habits), habits, tmp_path)


@pytest.mark.parametrize(("slot", "form"), REFUSED)
def test_a_form_without_equal_is_refused_in_one_line_with_a_remedy(slot, form):
    model = write(replace(Habits(), **{slot: form}))
    before = model.SerializeToString()
    with pytest.raises(SurgeryError, match=rf"{REFUSED[slot, form]}.*export with") as error:
        insert_nms(model)
    assert "\n" not in str(error.value)
    assert model.SerializeToString() == before


def test_a_float16_network_is_refused_before_the_calibration(tmp_path):
    habits = Habits(half=True)
    with pytest.raises(EngineError, match="are FLOAT16; quantisation starts from the float32"):
        check(write(habits), habits, tmp_path)


def test_inputs_that_nothing_reads_are_left_out():
    result = insert_nms(write(Habits(beside="input")))
    assert [value.name for value in result.model.graph.input] == ["image"]
    assert "inputs that nothing reads were left out: unread" in result.changes


def test_an_output_of_nothing_is_no_change():
    model = write(Habits(norm="plain"))
    first = next(node for node in model.graph.node if node.op_type == "Conv").output[0]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e9), "bound"))
    model.graph.node.add(op_type="Greater", input=[first, "bound"], output=["large"])
    model.graph.node.add(op_type="NonZero", input=["large"], output=["none"])
    model.graph.output.add(name="none")
    model = onnx.shape_inference.infer_shapes(model)
    assert insert_nms(model).modified


def optimised(model: onnx.ModelProto, level: str, folder) -> onnx.ModelProto:
    """What ONNX Runtime's optimiser writes."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("active", ["Relu", "Clip", "LeakyRelu"])
def test_what_onnx_runtime_fused_is_taken_apart(active, tmp_path):
    habits = Habits(norm="plain", block="residual", active=active)
    for level, fused in (("BASIC", False), ("EXTENDED", True)):
        model = optimised(write(habits), level, tmp_path)
        assert fused == any(node.op_type == "FusedConv" for node in model.graph.node)
        check(model, habits, tmp_path)


def test_a_graph_for_one_kind_of_cpu_is_refused(tmp_path):
    model = optimised(write(Habits()), "ALL", tmp_path)
    if not any(node.domain == "com.microsoft.nchwc" for node in model.graph.node):
        pytest.skip("ONNX Runtime writes no such graph on this CPU")
    with pytest.raises(SurgeryError, match=r"for one kind of CPU .* ORT_ENABLE_EXTENDED at most"):
        insert_nms(model)


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("FORMS_EXAMPLES", "10")),
    derandomize="FORMS_EXAMPLES" not in os.environ,
    phases=[Phase.generate],  # an example tells its forms and seed: a smaller one takes minutes
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    forms=st.fixed_dictionaries({slot: st.sampled_from(forms) for slot, forms in COMING.items()}),
    other=st.sampled_from([None] * 3 * len(REFUSED) + list(REFUSED)),
    seed=st.integers(0, 2**16),
)
def test_any_forms(forms, other, seed, tmp_path):
    """Through, or refused for a form that is known to have no equal; nothing else is raised."""
    habits = Habits(**forms | dict([other] if other else []))
    model = write(habits, seed)
    if habits.refused:
        with pytest.raises(SurgeryError, match="|".join(habits.refused)):
            insert_nms(model)
    else:
        check(model, habits, tmp_path)

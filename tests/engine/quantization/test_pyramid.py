"""Quantisation of a RetinaNet: grouped convolutions, an FPN, heads whose weights levels share."""

from collections import Counter, defaultdict

import numpy as np
import onnx
import pytest

from engine.model import load_detector
from engine.quantization.bias import correct_biases
from engine.quantization.calibration import calibrate
from engine.quantization.equalise import equalise
from engine.quantization.placement import find_placement
from engine.quantization.quantize import quantize
from engine.quantization.sensitivity import sensitivity
from graph_surgery.replace import insert_nms
from tests.support import calibrated, int8_simulation
from tests.support.retina_graphs import Retina, retina

KIND = Retina(height=64, width=64)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A detector, images and a calibration."""
    folder = tmp_path_factory.mktemp("pyramid")
    onnx.save(insert_nms(retina(KIND)).model, folder / "model.onnx")
    rng = np.random.default_rng(5)
    images = (0.2 * rng.normal(size=(6, 3, 64, 64))).astype(np.float32)
    held = calibrated.write_images(folder, images)
    detector = load_detector(folder / "model.onnx")
    return detector, held, images, calibrate(detector, held, method="minmax")


def test_placement(case):
    """What TensorRT fuses: the upsampling in steps, the lateral convolution takes it as a skip."""
    model = case[0].model
    placement = find_placement(model)
    made = {name: node for node in model.graph.node for name in node.output}
    upsampled = [node for node in model.graph.node if node.op_type == "Resize"]
    assert len(upsampled) == 2
    points = {(point.node, point.input): point for point in placement.points}
    for resize in upsampled:
        (add,) = (n for n in model.graph.node if resize.output[0] in n.input)
        skip = list(add.input).index(resize.output[0])
        before = points[resize.output[0], 0]
        behind = points[add.output[0], skip]
        assert before.tensor == before.source == behind.source == resize.input[0]
        assert (add.output[0], 1 - skip) not in points
        lateral = made[add.input[1 - skip]]
        assert placement.layers[behind.layer].node == lateral.output[0]
        assert before.layer == behind.layer
        assert resize.output[0] not in placement.tensors
    names = [layer.name for layer in placement.layers]
    assert len(set(names)) == len(names)
    assert not any("_ordered" in name for name in names)


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_an_upsampling_copies_steps(case, target):
    detector, _, _, calibration = case
    model = quantize(detector.model, calibration, target=target)
    known, made = calibrated.constants(model), {n: m for m in model.graph.node for n in m.output}
    for resize in (node for node in model.graph.node if node.op_type == "Resize"):
        before = made[resize.input[0]]
        (behind,) = (node for node in model.graph.node if resize.output[0] in node.input)
        assert (before.op_type, behind.op_type) == ("DequantizeLinear", "QuantizeLinear")
        for index in (1, 2):
            assert known[before.input[index]] == known[behind.input[index]]


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_weights_that_levels_share_are_the_same_in_steps(case, target):
    detector, _, _, calibration = case
    model = quantize(detector.model, calibration, target=target)
    tensors = calibrated.activations(model, calibrated.to_int8(model, case[2][:1]), optimise=False)
    tensors |= calibrated.constants(model)
    convs = {node.output[0]: node for node in model.graph.node if node.op_type == "Conv"}
    weights = defaultdict(list)
    for layer in find_placement(detector.model).layers:
        if layer.node in convs:
            weights[layer.weight].append(tensors[convs[layer.node].input[1]])
    shared = [uses for uses in weights.values() if len(uses) == 3]
    assert len(shared) == 4
    for first, *others in shared:
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_onnx_runtime_gives_what_numpy_does(case):
    """Node by node, the activations and weights of the float network rounded in NumPy."""
    detector, _, images, calibration = case
    model = quantize(detector.model, calibration)
    made = {name: node for node in model.graph.node for name in node.output}
    steps = [n for n in made if made[n].op_type == "QuantizeLinear" and made[n].input[0] in made]
    names = [*calibrated.heads(model), *steps]
    pixels = calibrated.to_int8(model, images[:1])
    values = calibrated.run(model, pixels, names, optimise=False)
    heads = values[: -len(steps)]
    told = {made[name].input[0]: v for name, v in zip(steps, values[-len(steps) :], strict=True)}
    expected = int8_simulation.heads(detector.model, calibration, pixels, told)
    for one, other in zip(heads, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.ptp(other))


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_heads_survive(case, target):
    """Two dozen layers one behind the other, of random weights, leave a tenth as noise at most."""
    detector, _, images, calibration = case
    model = quantize(detector.model, calibration, target=target)
    reference = calibrated.run(detector.model, images, calibrated.heads(detector.model))
    heads = calibrated.run(model, calibrated.to_int8(model, images), calibrated.heads(model))
    assert calibrated.snr_db(reference, heads) > 20


def test_every_grouped_filter_has_its_scale(case):
    """Independent: the largest magnitude of each filter is 127 steps."""
    detector, _, _, calibration = case
    model = quantize(detector.model, calibration)
    known, made = calibrated.constants(model), {n: m for m in model.graph.node for n in m.output}
    grouped = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and any(a.name == "group" and a.i == 4 for a in node.attribute)
    ]
    assert len(grouped) == 3
    for conv in grouped:
        weight, scale, _ = made[made[conv.input[1]].input[0]].input
        filters = known[weight]
        assert filters.shape == (16, 4, 3, 3)
        expected = np.abs(filters).max(axis=(1, 2, 3)) / 127
        np.testing.assert_allclose(known[scale], expected, rtol=1e-6)


def test_sensitivity_ranks_every_layer(case):
    detector, images, _, calibration = case
    found = sensitivity(detector, calibration, images, limit=1)
    assert len(found.layers) == len(find_placement(detector.model).layers)
    assert found.all_quantized.worst_db > 20
    assert all(np.isfinite(layer.only_quantized.worst_db) for layer in found.layers)


def test_equalised_it_gives_the_same_answers(case):
    """Grouped convolutions and heads of shared weights keep theirs."""
    detector, held, images, _ = case
    model = detector.model
    new = equalise(detector, held)
    names = calibrated.heads(model)
    given, made = (calibrated.run(one, images, names) for one in (model, new))
    assert calibrated.snr_db(given, made) > 90
    before, after = calibrated.constants(model), calibrated.constants(new)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    readers = Counter(node.input[1] for node in convolutions)
    groups = {n.input[1]: a.i for n in convolutions for a in n.attribute if a.name == "group"}
    changed = {name for name in readers if not np.array_equal(before[name], after[name])}
    assert changed
    assert not any(readers[name] > 1 or groups.get(name, 1) > 1 for name in changed)
    assert max(readers.values()) == 3 and max(groups.values()) > 1


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_every_level_has_a_corrected_bias_of_its_own(case, target):
    """The head of a level alone in INT8 has the mean of the float one, whose weights all share."""
    detector, held, images, calibration = case
    biases = correct_biases(detector, calibration, held, target=target)
    layers = find_placement(detector.model).layers
    shared = {name for name, n in Counter(layer.weight for layer in layers).items() if n > 1}
    chosen = [layer for layer in layers if layer.weight in shared][:3]
    assert len({layer.weight for layer in chosen}) < len(chosen)
    for layer in chosen:
        others = [other.name for other in layers if other is not layer]
        expected = calibrated.run(detector.model, images, [layer.node])[0]
        off = []
        for given in (None, biases):
            options = {"keep_float": others, "target": target, "biases": given}
            int8 = quantize(detector.model, calibration, **options)
            made = calibrated.run(int8, images, [layer.node], optimise=False)[0]
            off.append(np.abs((made - expected).mean(axis=(0, 2, 3), dtype=float)).max())
        assert off[1] < 0.05 * off[0]

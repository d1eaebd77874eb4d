"""INT8 graphs as fused layers, against ONNX Runtime on the same file.

Scales that are powers of two make every sum exact, so that small graphs have to agree to the bit;
in the exported network each layer is given ONNX Runtime's own inputs, for one step of difference
grows on its way.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.cudnn.graph import Convolution, Int8Graph, MaxPool
from engine.backends.cudnn.reader import read_int8_graph
from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from graph_surgery.protobuf import inputs, part
from tests.support.calibrated import activations, run, snr_db, write_images
from tests.support.graphs import nms_node
from tests.support.int8_graphs import Builder
from tests.support.int8_layers import run_as_cudnn, run_layers


def network_of(model):
    """From the image to the heads."""
    return part(model, inputs(model), list(nms_node(model).input[:-1]))


@pytest.fixture(scope="module")
def calibrated(surgered, small_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    calibration = calibrate(
        load_detector(surgered), write_images(folder, small_images[:2]), method="minmax"
    )
    return onnx.load(surgered), calibration


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def network(request, calibrated):
    return network_of(quantize(*calibrated, float_type=request.param))


def images_of(graph, small_images):
    steps = np.rint(small_images / np.float32(graph.tensors[graph.image].scale))
    return np.clip(steps, -127, 127).astype(np.int8)


def alone(graph, layer, values):
    """A graph of one layer, and the values that it reads besides the image."""
    names = {layer.x, getattr(layer, "residual", None)} - {None, graph.image}
    part = Int8Graph(graph.image, graph.tensors, (layer,), {})
    return part, {name: values[name] for name in names}


def test_every_layer_of_the_network_is_what_onnx_runtime_makes(network, small_images):
    graph = read_int8_graph(network)
    images = images_of(graph, small_images[:1])
    expected = activations(network, images, optimise=False)
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in network.graph.initializer)
    share = 0.02 if half else 1e-4  # float16 between the layers rounds as well
    for layer in graph.layers:
        part, given_values = alone(graph, layer, expected)
        value = run_layers(part, images, given_values)[layer.y]
        if graph.tensors[layer.y].scale is not None:
            difference = np.abs(value.astype(int) - expected[layer.y])
            assert difference.max() <= 1
            assert np.count_nonzero(difference) <= max(1, share * difference.size)
        for name, head in graph.heads.items():
            if head.tensor == layer.y:
                part = value[:, head.first : head.first + head.channels]
                assert snr_db([expected[name]], [part]) >= 50


def test_layers_of_the_network(network):
    graph = read_int8_graph(network)
    nodes = [node.op_type for node in network.graph.node]
    convolutions = [layer for layer in graph.layers if isinstance(layer, Convolution)]
    merged = sum(" + " in layer.name for layer in convolutions)
    assert merged == 6  # loc and conf of every level
    assert len(convolutions) + merged == nodes.count("Conv")
    assert sum(layer.relu for layer in convolutions) == nodes.count("Relu")
    assert sum(layer.residual is not None for layer in convolutions) == nodes.count("Add")
    assert [type(layer) for layer in graph.layers].count(MaxPool) == 1
    assert list(graph.heads) == [value.name for value in network.graph.output]
    made = {graph.image}
    for layer in graph.layers:  # in an order in which they can run
        assert {layer.x, getattr(layer, "residual", None) or layer.x} <= made
        made.add(layer.y)


def test_cudnn_is_given_the_same_network(network, small_images):
    graph = read_int8_graph(network)
    images = images_of(graph, small_images[:2])
    expected = run_layers(graph, images)
    for layer in graph.layers:
        part, given_values = alone(graph, layer, expected)
        found = run_as_cudnn(part, images, given_values)[layer.y]
        if graph.tensors[layer.y].scale is None:
            np.testing.assert_allclose(found, expected[layer.y], rtol=1e-5, atol=1e-5)
        else:  # constants in float32
            difference = np.abs(found.astype(int) - expected[layer.y])
            assert difference.max() <= 1
            assert np.count_nonzero(difference) <= max(1, 1e-4 * difference.size)


@st.composite
def networks(draw):
    """A small network: convolutions in a row, some with a skip, poolings, one or two heads."""
    seed = draw(st.integers(0, 2**32 - 1))
    builder = Builder(np.random.default_rng(seed), stored=draw(st.booleans()))
    size = draw(st.integers(9, 14)), draw(st.integers(9, 14))
    tensor = builder.image(draw(st.sampled_from([1, 3])), *size)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "block", "pool"]))
        kernel = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        stride = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        if kind == "conv":
            dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
            pads = [draw(st.integers(0, 3)) for _ in range(4)]
            relu, filters = draw(st.booleans()), draw(st.integers(1, 20))
            tensor = builder.convolution(
                tensor, filters, kernel, stride=stride, dilation=dilation, pads=pads, relu=relu
            )
        elif kind == "pool" and tensor != builder.first:
            pads = [draw(st.integers(0, kernel[axis % 2] - 1)) for axis in range(4)]
            tensor = builder.pool(tensor, kernel, stride=stride, pads=pads)
        else:
            inner = builder.convolution(tensor, 5, (3, 3), pads=[1, 1, 1, 1], relu=True)
            skipped = builder.convolution(tensor, 5, (1, 1))
            tensor = builder.convolution(
                inner, 5, (3, 3), pads=[1, 1, 1, 1], relu=draw(st.booleans()), residual=skipped
            )
    for filters in draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)):
        builder.head(tensor, filters)
    builder.shuffle()
    return builder


@pytest.mark.slow
@given(networks(), st.integers(1, 2))
def test_made_up_networks_agree_to_the_bit(builder, batch):
    model = builder.model()
    graph = read_int8_graph(model)
    shape = builder.shapes[builder.first]
    images = builder.rng.integers(-128, 128, (batch, *shape), np.int8)
    expected = run(model, images, builder.tensors, optimise=False)
    for found in (run_layers(graph, images), run_as_cudnn(graph, images)):
        for name, value in zip(builder.tensors, expected, strict=True):
            if name in graph.heads:
                head = graph.heads[name]
                part = found[head.tensor][:, head.first : head.first + head.channels]
                np.testing.assert_array_equal(part, value)
            else:
                np.testing.assert_array_equal(found[name], value)


def test_heads_that_read_other_tensors_or_geometries_stay_apart():
    builder = Builder(np.random.default_rng(0))
    x = builder.image(3, 12, 12)
    a = builder.convolution(x, 16, (3, 3), pads=[1] * 4)
    b = builder.convolution(a, 16, (3, 3), pads=[1] * 4)
    one, two = builder.head(a, 4), builder.head(a, 5)
    other, strided = builder.head(b, 4), builder.head(a, 4, stride=(2, 2))
    heads = read_int8_graph(builder.model()).heads
    assert heads[one].tensor == heads[two].tensor
    assert (heads[one].first, heads[two].first) == (0, 4)
    assert len({heads[name].tensor for name in (one, other, strided)}) == 3


def kept_float(calibrated, pattern):
    return network_of(quantize(*calibrated, keep_float=[pattern]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("loc.2", r"INT8 kernels cannot run Conv '.*': its input '.*loc.2.weight' is left float"),
        ("*layer1.4.1.conv1", r"its input '.*layer1.4.1.conv1.weight' is left float.*--keep-float"),
        ("*layer1.0", r"its input '.*layer1.0.weight' is left float"),
    ],
)
def test_a_layer_that_is_left_float_is_named(calibrated, pattern, message):
    with pytest.raises(EngineError, match=message):
        read_int8_graph(kept_float(calibrated, pattern))


def refused(change):
    """The message for a small network that `change` spoils."""
    builder = Builder(np.random.default_rng(0))
    x = builder.image(4, 12, 12)
    a = builder.convolution(x, 8, (3, 3), relu=True)
    builder.head(a, 4)
    model = builder.model()
    change(model.graph, builder)
    with pytest.raises(EngineError) as caught:
        read_int8_graph(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def node_of(graph, kind, index=0):
    return [node for node in graph.node if node.op_type == kind][index]


def test_an_operator_that_cannot_run_is_named():
    def change(graph, _):
        relu = node_of(graph, "Relu")
        relu.op_type, relu.name = "Sigmoid", "squash"

    message = refused(change)
    assert "goes to Sigmoid 'squash'" in message


def test_a_grouped_convolution_is_named():
    def change(graph, _):
        conv = node_of(graph, "Conv")
        conv.attribute.append(onnx.helper.make_attribute("group", 2))
        weight = next(t for t in graph.initializer if t.name == "weight_0")
        value = onnx.numpy_helper.to_array(weight)[:, :2]
        weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), weight.name))

    assert "Conv 'conv_0': grouped convolutions are not supported" in refused(change)


def test_zero_points_are_refused():
    def change(graph, _):
        name = node_of(graph, "QuantizeLinear").input[2]
        zero = next(t for t in graph.initializer if t.name == name)
        zero.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.int8), name))

    assert "zero points other than 0" in refused(change)


def test_automatic_padding_is_refused():
    def change(graph, _):
        conv = node_of(graph, "Conv")
        kept = [a for a in conv.attribute if a.name != "pads"]
        del conv.attribute[:]
        conv.attribute.extend([*kept, onnx.helper.make_attribute("auto_pad", "SAME_UPPER")])

    assert "auto_pad is not supported" in refused(change)


def test_an_addition_that_broadcasts_is_refused():
    builder = Builder(np.random.default_rng(0))
    x = builder.image(4, 12, 12)
    small = builder.convolution(x, 1, (1, 1))
    builder.head(builder.convolution(x, 8, (1, 1), residual=small), 4)
    with pytest.raises(EngineError, match=r"Add 'add_1': additions that broadcast are not supp"):
        read_int8_graph(builder.model())


def test_an_addition_of_two_float_tensors_is_refused():
    builder = Builder(np.random.default_rng(0))
    x = builder.image(4, 12, 12)
    builder.head(builder.convolution(x, 8, (3, 3)), 4)
    graph = builder.graph
    conv = node_of(graph, "Conv")
    first = conv.output[0]
    add = onnx.helper.make_node("Add", [first, first], ["doubled"], "double")
    quantise = node_of(graph, "QuantizeLinear", -2 if builder.stored else 0)
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] == first:
            quantise = node
    position = list(graph.node).index(quantise)
    quantise.input[0] = "doubled"
    graph.node.insert(position, add)
    with pytest.raises(EngineError, match=r"cannot run Conv 'conv_0': .* goes to Add 'double'"):
        read_int8_graph(builder.model())

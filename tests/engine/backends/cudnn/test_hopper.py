"""Which layers libint8_conv.so takes over from cuDNN, and what it is told, without a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from engine.backends.cudnn.graph import Convolution, Int8Graph, MaxPool, Tensor, Window
from engine.backends.cudnn.hopper import (
    STEM_WEIGHT,
    Hopper,
    hopper_candidate,
    hopper_library,
    stem_constants,
)
from engine.backends.cudnn.layers import groups
from engine.backends.cudnn.measure import Chooser
from engine.backends.cudnn.plans import BIAS, MULTIPLIER, WEIGHT
from engine.backends.cudnn.program import Candidate, Places

PLACES = Places(x=16, y=32, residual=48, workspace=64)
CUDNN = SimpleNamespace(constants={}, candidate=lambda *_: Candidate("cudnn", 0, None))
CONSTANTS = {WEIGHT: 80, MULTIPLIER: 96, BIAS: 112, STEM_WEIGHT: 128}
THREE = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
SEVEN = Window((7, 7), (2, 2), (1, 1), (3, 3, 3, 3))
HALVE = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1))


class Recorder:
    """Stands in for the library: keeps the arguments of its last call."""

    def __init__(self):
        self.called = None

    def __getattr__(self, name):
        def call(*arguments):
            self.called = (name, arguments)
            return 0

        return call


def convolution(name, x, y, shape, window, *, residual=None, relu=True):
    ones = np.ones(shape[0], np.float32)
    return Convolution(name, x, y, residual, np.ones(shape, np.int8), ones, ones, window, relu)


def network():
    """An image of 40x80, the stem, a block of two convolutions, and one more."""
    tensors = {
        "image": Tensor(3, 40, 80, 0.02),
        "stem": Tensor(64, 20, 40, 0.5),
        "pooled": Tensor(64, 10, 20, 0.25),
        "inner": Tensor(64, 10, 20, 0.125),
        "sum": Tensor(64, 10, 20, 2.0),
        "head": Tensor(64, 10, 20, None),
    }
    layers = (
        convolution("conv0", "image", "stem", (64, 3, 7, 7), SEVEN),
        MaxPool("pool", "stem", "pooled", HALVE),
        convolution("conv1", "pooled", "inner", (64, 64, 3, 3), THREE),
        convolution("conv2", "inner", "sum", (64, 64, 3, 3), THREE, residual="pooled"),
        convolution("conv3", "sum", "head", (64, 64, 3, 3), THREE, relu=False),
    )
    return Int8Graph("image", tensors, layers, {})


def run(graph, group, batch=5):
    """What the library is called with on stream 7; None: it does not take the group."""
    library = Recorder()
    candidate = hopper_candidate(library, graph, batch, group, CONSTANTS)
    if candidate is None:
        return None
    candidate.bind(PLACES)(7)
    name, arguments = library.called
    return name, [*arguments[:-1], arguments[-1].value]


def test_what_the_library_is_called_with():
    """The arguments of int8_conv.h, in its order; scales divided by y's."""
    graph = network()
    first, second, third, last = groups(graph)
    none = replace(PLACES, residual=None)
    assert run(graph, first) == ("int8_conv_stem", [5, 40, 80, 16, 128, 96, 112, 2.0, 32, 7])
    library = Recorder()
    hopper_candidate(library, graph, 1, second, CONSTANTS).bind(none)(7)
    assert library.called[1][:-1] == (1, 10, 20, 64, 64, 16, 80, 96, 112, None, 0.0, 32)
    expected = [5, 10, 20, 64, 64, 16, 80, 96, 112, 48, 0.125, 32, 7]
    assert run(graph, third) == ("int8_conv_3x3", expected)
    assert run(graph, last) is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "taken"),
    [(64, 192, True), (128, 256, True), (128, 64, False), (256, 256, True), (256, 64, True)],
)
def test_channels(inputs, outputs, taken):
    graph = network()
    for name, channels in (("pooled", inputs), ("inner", outputs)):
        graph = with_tensor(graph, name, replace(graph.tensors[name], channels=channels))
    graph = changed(graph, "conv1", weight=np.ones((outputs, inputs, 3, 3), np.int8))
    _, second, *_ = groups(graph)
    expected = [5, 10, 20, inputs, outputs, 16, 80, 96, 112, 48, 0.0, 32, 7]
    assert run(graph, second) == (("int8_conv_3x3", expected) if taken else None)


def changed(graph, name, **changes):
    """The graph with another layer of this name."""
    layers = tuple(
        replace(layer, **changes) if layer.name == name else layer for layer in graph.layers
    )
    return replace(graph, layers=layers)


def with_tensor(graph, name, tensor):
    return replace(graph, tensors={**graph.tensors, name: tensor})


@pytest.mark.parametrize(
    ("layer", "changes"),
    [
        ("conv1", {"relu": False}),
        ("conv1", {"window": replace(THREE, pads=(0, 0, 0, 0))}),
        ("conv1", {"window": replace(THREE, stride=(2, 2))}),
        ("conv1", {"window": replace(THREE, dilation=(2, 2))}),
        ("conv1", {"weight": np.ones((64, 32, 3, 3), np.int8)}),
        ("conv1", {"weight": np.ones((96, 96, 3, 3), np.int8)}),
        ("conv1", {"weight": np.ones((96, 64, 3, 3), np.int8)}),
        ("conv0", {"relu": False}),
        ("conv0", {"window": replace(SEVEN, pads=(2, 2, 2, 2))}),
        ("conv0", {"weight": np.ones((16, 3, 7, 7), np.int8)}),
        ("pool", {"window": replace(HALVE, kernel=(2, 2))}),
    ],
)
def test_layers_that_are_left_to_cudnn(layer, changes):
    graph = changed(network(), layer, **changes)
    group = next(group for group in groups(graph) if layer in {one.name for one in group})
    assert run(graph, group) is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("image", Tensor(3, 42, 80, 0.02)), ("image", Tensor(3, 40, 78, 0.02))],
)
def test_images_that_are_left_to_cudnn(name, tensor):
    graph = with_tensor(network(), name, tensor)
    assert run(graph, groups(graph)[0]) is None
    assert stem_constants(graph, groups(graph)[0]) == {}


def test_constants_of_the_stem():
    graph = network()
    found = [stem_constants(graph, group) for group in groups(graph)]
    assert [list(one) for one in found] == [[STEM_WEIGHT], [], [], []]
    assert found[0][STEM_WEIGHT].sum() == 64 * 3 * 49


def test_what_was_fastest_is_measured_once_and_kept(monkeypatch):
    graph, measured = network(), []

    def slowest_first(_self, candidates, sizes, _settle_s):
        measured.append(sizes)
        return candidates[-1].name

    monkeypatch.setattr(Chooser, "_measure", slowest_first)

    def choose(hopper, winners=()):
        chooser = Chooser(CUDNN, hopper, graph, None, lambda: dict(winners), take_turn=bool)
        names = [chooser(batch, group).name for batch in (1, 2) for group in groups(graph)]
        return names, chooser.winners

    hopper = Hopper(Recorder(), "first")
    names, winners = choose(hopper)
    assert names == ["int8_conv_stem", "int8_conv_3x3", "int8_conv_3x3", "cudnn"] * 2
    assert len(measured) == len(winners) == 6
    image, pooled = 3 * 40 * 80, 64 * 10 * 20
    assert measured[3:] == [
        (2 * image, 2 * pooled, 0),
        (2 * pooled, 2 * pooled, 0),
        (2 * pooled, 2 * pooled, 2 * pooled),
    ]
    del measured[:]
    assert choose(hopper, winners) == (names, winners)
    assert choose(hopper, dict.fromkeys(winners, "cudnn"))[0] == ["cudnn"] * 8
    assert not measured
    assert choose(hopper, dict.fromkeys(winners, "gone")) == (names, winners)
    assert len(measured) == 6
    assert len(choose(Hopper(Recorder(), "second"), winners)[1]) == 12
    assert choose(None)[0] == ["cudnn"] * 8


def test_layers_of_as_many_bytes_are_measured_each(monkeypatch):
    """64 channels at 10x20, 256 at 5x10, and at four times the batch 64 at 5x10."""
    tensors = {"image": Tensor(3, 40, 80, 0.5), "wide": Tensor(64, 10, 20, 0.5)}
    tensors |= {"deep": Tensor(256, 5, 10, 0.5), "small": Tensor(64, 5, 10, 0.5)}
    wide, deep, small = (
        convolution(name, name, name, (tensors[name].channels,) * 2 + (3, 3), THREE)
        for name in ("wide", "deep", "small")
    )
    graph = Int8Graph("image", tensors, (wide, deep, small), {})
    measured = []

    def keep(_self, candidates, sizes, _settle_s):
        measured.append(sizes)
        return candidates[len(measured) % 2].name

    monkeypatch.setattr(Chooser, "_measure", keep)
    chooser = Chooser(CUDNN, Hopper(Recorder(), ""), graph, None, dict, take_turn=bool)
    runs = ((4, wide), (4, deep), (16, small))
    names = [chooser(batch, (layer,)).name for batch, layer in runs]
    assert measured == [(4 * 64 * 10 * 20,) * 2 + (0,)] * 3
    assert names == ["int8_conv_3x3", "cudnn", "int8_conv_3x3"]


def test_large_batches_are_compared_at_the_limit_of_power(monkeypatch):
    settled = {}

    def keep(_self, candidates, sizes, settle_s):
        settled[sizes[0] // (3 * 40 * 80)] = settle_s
        return candidates[0].name

    monkeypatch.setattr(Chooser, "_measure", keep)
    chooser = Chooser(CUDNN, Hopper(Recorder(), ""), network(), None, dict, take_turn=bool)
    for batch in (1, 15, 16, 64):
        chooser(batch, groups(network())[0])
    assert settled[1] == settled[15] == 0
    assert settled[16] == settled[64] > 0


@pytest.mark.parametrize("capability", ["8.0", "8.9", "10.0", "12.0"])
def test_other_gpus_are_left_to_cudnn(capability):
    assert hopper_library(capability) is None


def test_a_missing_library_is_told(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("NMS_OPT_LIBRARY", str(tmp_path / "libnms_opt.so"))
    assert hopper_library("9.0") is None
    assert "slower than it could be" in caplog.text
    assert "libint8_conv.so not found: build it with build-plugin" in caplog.text

"""Buffers that share memory, and what the full-size network needs of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.cudnn.arena import ALIGNMENT, Need, plan_arena
from engine.backends.cudnn.graph import Convolution
from engine.backends.cudnn.layers import constants, conv_shape, tensor_bytes
from engine.backends.cudnn.plans import Choice, CompiledPlan
from engine.backends.cudnn.program import Kernels, make_program, plan_activations
from tests.support.ssd_geometry import ssd_graph

GIB = 2**30


@st.composite
def needs(draw):
    found = []
    for index in range(draw(st.integers(0, 25))):
        first = draw(st.integers(0, 20))
        last = draw(st.integers(first, 20))
        found.append(Need(str(index), draw(st.integers(1, 5000)), first, last))
    return found


@given(needs())
def test_what_is_needed_together_does_not_overlap(wanted):
    arena = plan_arena(wanted)
    assert arena.offsets.keys() == {need.name for need in wanted}
    for index, a in enumerate(wanted):
        start = arena.offsets[a.name]
        assert start % ALIGNMENT == 0
        assert 0 <= start <= arena.size - a.size
        for b in wanted[:index]:
            other = arena.offsets[b.name]
            together = a.first <= b.last and b.first <= a.last
            assert not together or start + a.size <= other or other + b.size <= start


@given(needs())
def test_no_more_than_everything_side_by_side_and_no_less_than_the_fullest_step(wanted):
    arena = plan_arena(wanted)
    aligned = [-(-need.size // ALIGNMENT) * ALIGNMENT for need in wanted]
    assert arena.size <= sum(aligned)
    for step in range(21):
        assert arena.size >= sum(n.size for n in wanted if n.first <= step <= n.last)


def test_buffers_one_after_the_other_share_their_place():
    arena = plan_arena([Need(str(step), 1024, step, step + 1) for step in range(10)])
    assert arena.size == 2048


def live(graph):
    """For each layer, the tensors that are there while it runs, told from the graph alone."""
    made = {layer.y: index for index, layer in enumerate(graph.layers)}
    last = {}
    for index, layer in enumerate(graph.layers):
        for name in (layer.x, getattr(layer, "residual", None)):
            last[name] = index
    last |= {head.tensor: len(graph.layers) for head in graph.heads.values()}
    for index in range(len(graph.layers)):
        yield [name for name, first in made.items() if first <= index <= last[name]]


def test_activations_of_the_full_network():
    graph = ssd_graph()
    assert sum(isinstance(layer, Convolution) for layer in graph.layers) == 45
    arena = plan_activations(graph, 2)
    for names in live(graph):
        ranges = sorted(
            (arena.offsets[name], arena.offsets[name] + tensor_bytes(graph, name, 2))
            for name in names
            if name in arena.offsets
        )
        for (_, end), (start, _) in pairwise(ranges):
            assert end <= start
    every = sum(tensor_bytes(graph, name, 2) for name in arena.offsets)
    assert arena.size < every / 4


def test_batch_64_of_the_full_network_stays_far_under_8_gib():
    graph, batch = ssd_graph(), 64
    plans = {}
    for layer in graph.layers:
        if isinstance(layer, Convolution):
            shape = conv_shape(graph, layer, batch)
            plans[shape] = CompiledPlan(shape, Choice(0, ()), 0, b""), None
    kernels = Kernels(None, None, plans, {})
    program = make_program(graph, batch, lambda group: kernels.candidate(graph, batch, group))
    images = batch * int(np.prod(graph_shape(graph)))
    weights = sum(
        array.nbytes
        for layer in graph.layers
        if isinstance(layer, Convolution)
        for array in constants(graph, layer).values()
    )
    assert images == 64 * 3 * 1200 * 1200
    assert 19e6 < weights < 25e6
    total = program.arena.size + program.workspace_bytes + 2 * images + weights
    assert total < 5 * GIB


def graph_shape(graph):
    image = graph.tensors[graph.image]
    return image.channels, image.height, image.width

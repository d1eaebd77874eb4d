"""The work on one batch size: layers bound to memory, each by the fastest way to run it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.backends.cudnn.arena import Arena, Need, aligned, plan_arena
from engine.backends.cudnn.graph import Convolution, Int8Graph, Layer, MaxPool
from engine.backends.cudnn.layers import (
    conv_shape,
    groups,
    pack_shape,
    pool_multiplier,
    pool_shape,
    tensor_bytes,
)
from engine.backends.cudnn.plans import (
    RESIDUAL,
    CompiledPlan,
    ConvShape,
    X,
    Y,
    execute,
)
from plugin_cuda.int8_layers import max_pool, pack

Run = Callable[[int], None]
"""Enqueues work on a stream, given as its cudaStream_t."""


@dataclass(frozen=True)
class Places:
    """Device addresses of what a layer reads and writes."""

    x: int
    y: int
    residual: int | None
    workspace: int


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer at one batch size.

    Attributes
    ----------
    name
        For the manifest and the table of layers.
    workspace_bytes
        Device memory that it needs while it runs.
    bind
        Fixes the addresses.
    """

    name: str
    workspace_bytes: int
    bind: Callable[[Places], Run] = field(repr=False)


@dataclass(frozen=True)
class Step:
    """A layer, or two that run as one, and how it is run."""

    layers: tuple[Layer, ...]
    candidate: Candidate

    @property
    def name(self) -> str:
        """Names of its layers."""
        return ", ".join(layer.name for layer in self.layers)


@dataclass(frozen=True)
class Program:
    """Everything that runs at one batch size, from the image to the heads."""

    graph: Int8Graph
    batch: int
    steps: tuple[Step, ...]
    arena: Arena

    @property
    def workspace_bytes(self) -> int:
        """Device memory that the steps need one after the other."""
        return max(step.candidate.workspace_bytes for step in self.steps)

    def bind(self, image: int, arena: int, workspace: int) -> list[Run]:
        """Fix the addresses of every step.

        Parameters
        ----------
        image
            int8 [batch, C, H, W].
        arena, workspace
            Memory of ``arena.size`` and `workspace_bytes`.
        """

        def address(name: str) -> int:
            return image if name == self.graph.image else arena + self.arena.offsets[name]

        runs = []
        for step in self.steps:
            first, last = step.layers[0], step.layers[-1]
            skipped = first.residual if isinstance(first, Convolution) else None
            residual = None if skipped is None else address(skipped)
            places = Places(address(first.x), address(last.y), residual, workspace)
            runs.append(step.candidate.bind(places))
        return runs


def make_program(
    graph: Int8Graph, batch: int, choose: Callable[[tuple[Layer, ...]], Candidate]
) -> Program:
    """Choose how to run every layer, and plan the memory between them.

    Parameters
    ----------
    choose
        Chooses the way to run a group of layers.
    """
    steps = tuple(Step(group, choose(group)) for group in groups(graph))
    return Program(graph, batch, steps, plan_activations(graph, batch))


def plan_activations(graph: Int8Graph, batch: int) -> Arena:
    """Plan the memory of all activations but the image; heads stay until the end."""
    found = groups(graph)
    first = {group[-1].y: index for index, group in enumerate(found)}
    last = dict(first)
    for index, group in enumerate(found):
        layer = group[0]
        last[layer.x] = index
        if isinstance(layer, Convolution) and layer.residual is not None:
            last[layer.residual] = index
    last |= {head.tensor: len(found) for head in graph.heads.values()}
    return plan_arena(
        [Need(name, tensor_bytes(graph, name, batch), first[name], last[name]) for name in first]
    )


@dataclass(frozen=True)
class Kernels:
    """What layers are run with.

    Attributes
    ----------
    handle
        Its stream has to be the one that runs are given.
    library
        libint8_layers.so.
    plans
        Of every shape: the plan and its executable graph.
    constants
        Device addresses of every convolution's constant tensors, by its result and their number.
    """

    handle: Any
    library: ctypes.CDLL
    plans: Mapping[ConvShape, tuple[CompiledPlan, Any]]
    constants: Mapping[str, Mapping[int, int]]

    def candidate(self, graph: Int8Graph, batch: int, group: tuple[Layer, ...]) -> Candidate:
        """Run a group one kernel after the other, what lies between them in the workspace."""
        first = group[0]
        if isinstance(first, MaxPool):
            return Candidate("max pool", 0, lambda p: self._pool(graph, first, batch, x=p.x, y=p.y))
        if len(group) == 1:
            return self._convolution(graph, batch, first)
        inner = self._convolution(graph, batch, first)
        (pool,) = (layer for layer in group if isinstance(layer, MaxPool))
        between = aligned(tensor_bytes(graph, first.y, batch))

        def bind(places: Places) -> Run:
            middle = places.workspace
            runs = (
                inner.bind(Places(places.x, middle, places.residual, middle + between)),
                self._pool(graph, pool, batch, x=middle, y=places.y),
            )

            def run_both(stream: int) -> None:
                for run in runs:
                    run(stream)

            return run_both

        return Candidate(f"{inner.name}, max pool", between + inner.workspace_bytes, bind)

    def _pool(self, graph: Int8Graph, layer: MaxPool, batch: int, *, x: int, y: int) -> Run:
        shape, multiplier = pool_shape(graph, layer, batch), pool_multiplier(graph, layer)
        return lambda stream: max_pool(self.library, shape, multiplier, x=x, y=y, stream=stream)

    def _convolution(self, graph: Int8Graph, batch: int, layer: Convolution) -> Candidate:
        shape = conv_shape(graph, layer, batch)
        packing = pack_shape(graph, layer, shape)
        plan, executable = self.plans[shape]
        room = 0
        if packing is not None:
            room = aligned(batch * shape.height * shape.width * shape.channels * 2)

        def bind(places: Places) -> Run:
            addresses = dict(self.constants[layer.y])
            addresses |= {X: places.x if packing is None else places.workspace, Y: places.y}
            if places.residual is not None:
                addresses[RESIDUAL] = places.residual
            workspace = places.workspace + room

            def run(stream: int) -> None:
                if packing is not None:
                    pack(self.library, packing, places.x, places.workspace, stream)
                execute(executable, self.handle, addresses, workspace)

            return run

        name = f"{plan.choice}" if packing is None else f"pack, {plan.choice}"
        return Candidate(name, room + plan.workspace_bytes, bind)

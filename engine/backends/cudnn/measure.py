"""How long kernels take on the GPU, on memory and data of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda import Stream
from engine.backends.cudnn.graph import Convolution, Int8Graph, Layer
from engine.backends.cudnn.hopper import Hopper, hopper_candidate
from engine.backends.cudnn.layers import conv_shape, tensor_bytes
from engine.backends.cudnn.plans import (
    BIAS,
    MULTIPLIER,
    RESIDUAL,
    RESIDUAL_MULTIPLIER,
    WEIGHT,
    CompiledPlan,
    ConvShape,
    X,
    Y,
    execute,
    load_plan,
)
from engine.backends.cudnn.program import Candidate, Kernels, Places, Run
from engine.errors import EngineError

_ROUNDS = 3
_ROUND_MS = 2.0
_MOST_REPEATS = 20
"""A measurement repeats a kernel for so long, but so often at most; the fastest round counts."""

_HOPELESS = 2.0
"""A kernel is not measured further when its first runs take so many times the fastest, and longer
than a round: one run of a shorter one may be mostly launch."""

_SUSTAINED_BATCH = 16
"""From this batch size on, libint8_conv.so and cuDNN are compared as they are at the GPU's limit of
power, which a large batch runs into: in a burst, one that takes more energy looks better."""

_SETTLE_S = 0.4
"""Seconds of one kernel, after which the clock has found its frequency."""

_BLOCK = 1 << 22
"""Bytes of random data, repeated in larger tensors."""

_DEVIATION = 25
"""Of the random data, in steps of its scale: power depends on what is multiplied."""


def measure(
    stream: Stream, run: Run, fastest: float = float("inf"), *, settle_s: float = 0.0
) -> float:
    """Milliseconds of some work, replayed as a CUDA graph so that the host does not count.

    Parameters
    ----------
    fastest
        The best time so far; work longer than a round that is hopelessly slower is not repeated.
    settle_s
        Seconds for which it is repeated before it is measured.
    """
    start, end = stream.event(timing=True), stream.event(timing=True)

    def timed(work: Callable[[], None]) -> float:
        stream.record(start)
        work()
        stream.record(end)
        end.synchronize()
        return end.elapsed_ms(start)

    run(stream.handle)  # loads the kernel
    stream.synchronize()
    single = stream.capture(lambda: run(stream.handle))
    once = min(timed(single) for _ in range(2))  # the first launch also uploads the CUDA graph
    if once > max(_HOPELESS * fastest, _ROUND_MS):
        return once
    repeats = max(1, min(_MOST_REPEATS, int(_ROUND_MS / once)))

    def work() -> None:
        for _ in range(repeats):
            run(stream.handle)

    replay = stream.capture(work)
    settled = time.monotonic() + settle_s
    while time.monotonic() < settled:
        timed(replay)
    return min(timed(replay) for _ in range(_ROUNDS)) / repeats


def measure_plans(
    cudnn: Any, handle: Any, stream: Stream, shape: ConvShape, plans: Sequence[CompiledPlan]
) -> list[float]:
    """Milliseconds of plans of one shape; infinite for one that does not run.

    Parameters
    ----------
    stream
        The handle's; all that it owns is released.
    """
    memory = _tensors(stream, shape)
    workspace = stream.device(max((plan.workspace_bytes for plan in plans), default=0) + 1)
    times: list[float] = []
    for plan in plans:
        try:
            graph = load_plan(cudnn, handle, plan)

            def run(_: int, graph: Any = graph) -> None:
                execute(graph, handle, memory, workspace)

            times.append(measure(stream, run, min(times, default=float("inf"))))
        except EngineError:
            times.append(float("inf"))
    stream.free()
    return times


class Chooser:
    """Chooses the fastest way to run a group of layers; layers of one shape are measured once.

    Parameters
    ----------
    known
        Returns what is known; it is asked again before the first measurement.
    take_turn
        See `engine.backends.cudnn.tuning.Turn.take`.

    Attributes
    ----------
    winners
        Names of the fastest candidates, by a key that changes with everything that they depend on.
    """

    def __init__(
        self,
        kernels: Kernels,
        hopper: Hopper | None,
        graph: Int8Graph,
        stream: Stream,
        known: Callable[[], Mapping[str, str]],
        *,
        take_turn: Callable[[], bool],
    ) -> None:
        self._kernels = kernels
        self._hopper = hopper
        self._graph = graph
        self._stream = stream
        self._known = known
        self._take_turn = take_turn
        self.winners = dict(known())

    def __call__(self, batch: int, group: tuple[Layer, ...]) -> Candidate:
        """Choose for a batch size: cuDNN's fastest kernels, or libint8_conv.so's where it can."""
        graph, first = self._graph, group[0]
        cudnn = self._kernels.candidate(graph, batch, group)
        if self._hopper is None or not isinstance(first, Convolution):
            return cudnn
        constants = self._kernels.constants.get(first.y, {})
        own = hopper_candidate(self._hopper.library, graph, batch, group, constants)
        if own is None:
            return cudnn
        candidates = {one.name: one for one in (cudnn, own)}
        shape = conv_shape(graph, first, batch)
        key = f"{' or '.join(candidates)} of {self._hopper.sha256}, {shape}"
        if self.winners.get(key) not in candidates and self._take_turn():
            self.winners |= self._known()
        if self.winners.get(key) not in candidates:
            source = graph.tensors[graph.image]
            image = source.channels * source.height * source.width
            sizes = (
                batch * image if first.x == graph.image else tensor_bytes(graph, first.x, batch),
                tensor_bytes(graph, group[-1].y, batch),
                0 if first.residual is None else tensor_bytes(graph, first.residual, batch),
            )
            settle_s = _SETTLE_S if batch >= _SUSTAINED_BATCH else 0.0
            self.winners[key] = self._measure(list(candidates.values()), sizes, settle_s)
        return candidates[self.winners[key]]

    def _measure(
        self, candidates: Sequence[Candidate], sizes: tuple[int, int, int], settle_s: float
    ) -> str:
        """Name of the fastest; all that the stream owns is released."""
        stream = self._stream
        x, y, residual = (_random(stream, size) if size else None for size in sizes)
        workspace = stream.device(max(one.workspace_bytes for one in candidates) + 1)
        places = Places(x or 0, y or 0, residual, workspace)
        times = [measure(stream, one.bind(places), settle_s=settle_s) for one in candidates]
        stream.free()
        return candidates[times.index(min(times))].name


def _tensors(stream: Stream, shape: ConvShape) -> dict[int, int]:
    """Random tensors for a plan, by their numbers."""
    half = shape.source == "float16"
    weight = shape.filters * shape.channels * shape.window.kernel[0] * shape.window.kernel[1]
    x = shape.batch * shape.channels * shape.height * shape.width
    y = shape.batch * shape.filters * shape.rows * shape.columns
    small = np.full(shape.filters, 1e-3, np.float32)
    found = {
        X: _random(stream, x << half, half=half),
        WEIGHT: _random(stream, weight << half, half=half, relu=False),
        Y: stream.device(y << (shape.target == "float16")),
    }
    numbers = [MULTIPLIER, BIAS]
    if shape.residual:
        found[RESIDUAL] = _random(stream, y)
        numbers.append(RESIDUAL_MULTIPLIER)
    for number in numbers:
        found[number] = stream.device(small.nbytes)
        stream.upload(found[number], small)
    return found


def _random(stream: Stream, size: int, *, half: bool = False, relu: bool = True) -> int:
    """Allocate memory filled with random int8, as behind a ReLU or before it, or such float16."""
    block = _block(relu=relu)
    data = (block.astype(np.float16) if half else block).view(np.uint8)
    address = stream.device(size)
    for offset in range(0, size, data.nbytes):
        stream.upload(address + offset, data[: size - offset])
    return address


@cache
def _block(*, relu: bool) -> NDArray[np.int8]:
    """Draw int8 [_BLOCK] like activations, or like weights."""
    normal = np.random.default_rng(0).normal(0, _DEVIATION, _BLOCK)
    block: NDArray[np.int8] = np.rint(normal.clip(0 if relu else -127, 127)).astype(np.int8)
    return block

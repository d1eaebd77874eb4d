"""A fused INT8 layer as a cuDNN graph: describing it, listing its engines, compiling one of them.

cuDNN compiles a kernel for every choice of engine and knobs (0.8 s each on the machine of
docs/measurements), with Python's lock held, so choices are compiled in processes of their own.
What they return is cuDNN's serialised plan, which loads in 10 ms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

from engine.backends.cuda import use_gpu
from engine.backends.cudnn.graph import Window
from engine.errors import EngineError, one_line

X, WEIGHT, MULTIPLIER, BIAS, RESIDUAL, RESIDUAL_MULTIPLIER, Y = range(1, 8)
"""Numbers of the tensors of a plan."""

_KNOB = "KERNEL_CFG"
"""Knob that chooses between the kernels of an engine."""

_MOST_WORKERS = 16
"""Each holds a CUDA context, some 0.5 GB of GPU memory."""


@dataclass(frozen=True)
class ConvShape:
    """Everything on which a plan depends: sizes, types and what is fused; all NHWC.

    Attributes
    ----------
    batch, channels, height, width
        Of x.
    filters
        Channels of y.
    window
        Geometry.
    source, target
        Types of x (and the weight), and of y.
    residual, relu
        Whether an INT8 residual is added; whether negative values become 0.
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    window: Window
    source: Literal["int8", "float16"]
    target: Literal["int8", "float16"]
    residual: bool
    relu: bool

    @property
    def rows(self) -> int:
        """Height of y."""
        return self._size(0, self.height)

    @property
    def columns(self) -> int:
        """Width of y."""
        return self._size(1, self.width)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the convolution."""
        taps = self.window.kernel[0] * self.window.kernel[1] * self.channels
        return 2 * self.batch * self.rows * self.columns * self.filters * taps

    def __str__(self) -> str:
        """Key of the tuning cache; the batch first."""
        window = self.window
        text = (
            f"n{self.batch} {self.source} {self.channels}x{self.height}x{self.width} "
            f"{self.target} {self.filters} kernel {_by(window.kernel)} stride {_by(window.stride)} "
            f"dilation {_by(window.dilation)} pads {_by(window.pads)}"
        )
        return text + " residual" * self.residual + " relu" * self.relu

    def _size(self, axis: int, size: int) -> int:
        window = self.window
        reach = (window.kernel[axis] - 1) * window.dilation[axis] + 1
        return (size + window.pads[axis] + window.pads[axis + 2] - reach) // window.stride[axis] + 1


@dataclass(frozen=True)
class Choice:
    """One of cuDNN's kernels for a graph: an engine and the values of its knobs by name."""

    engine: int
    knobs: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        knobs = ", ".join(f"{name} {value}" for name, value in self.knobs)
        return f"cuDNN engine {self.engine}" + (f", {knobs}" if knobs else "")


@dataclass(frozen=True)
class CompiledPlan:
    """A choice compiled: cuDNN's serialised plan, and the workspace that it needs."""

    shape: ConvShape
    choice: Choice
    workspace_bytes: int
    plan: bytes


def import_cudnn() -> Any:
    """Import cuDNN's frontend.

    Raises
    ------
    EngineError
        When it or cuDNN itself is not installed; says which.
    """
    missing = "its frontend (nvidia-cudnn-frontend)"
    try:
        import cudnn

        missing = "cuDNN itself (nvidia-cudnn-cu13)"
        cudnn.backend_version()
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            "the engine 'cudnn' needs an NVIDIA GPU, cuDNN and its frontend; what fails here is "
            f"{missing}: {one_line(error)}; pip install 'ssd-resnet34-trt[cudnn]'"
        ) from error
    return cudnn


def choices(cudnn: Any, handle: Any, shape: ConvShape, *, every: bool) -> list[Choice]:
    """List cuDNN's kernels for a shape, the ones that its heuristics advise first.

    Parameters
    ----------
    every
        Also those of the first engine that the heuristics do not advise.

    Raises
    ------
    EngineError
        When cuDNN has none.
    """
    found: list[Choice] = []
    try:
        graph = _describe(cudnn, handle, shape)
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B])
        for index in range(graph.get_execution_plan_count()):
            engine, knobs = graph.get_engine_and_knobs_at_index(index)
            found.append(Choice(engine, tuple((k.name, v) for k, v in knobs.items())))
        if every and found:
            first = found[0].engine
            for knob in graph.get_knobs_for_engine(first):
                if knob.type.name == _KNOB:
                    values = range(knob.min_value, knob.max_value + 1)
                    found += [Choice(first, ((_KNOB, value),)) for value in values]
    except _failures(cudnn) as error:
        raise EngineError(f"cuDNN cannot run {shape}: {one_line(error)[:300]}") from error
    if not found:
        raise EngineError(f"cuDNN cannot run {shape}: it has no kernel")
    return list(dict.fromkeys(found))


def compile_all(
    jobs: Sequence[tuple[ConvShape, Choice]], device: int, progress: Callable[[], None]
) -> dict[ConvShape, list[CompiledPlan]]:
    """Compile choices, as many at a time as there are CPUs; those that fail are left out.

    Parameters
    ----------
    device
        Number of the GPU.
    progress
        Called after each.

    Raises
    ------
    EngineError
        When a process ends by itself, as for want of memory.
    """
    compiled: dict[ConvShape, list[CompiledPlan]] = {shape: [] for shape, _ in jobs}
    workers = max(1, min(len(os.sched_getaffinity(0)), len(jobs), _MOST_WORKERS))
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=use_gpu, initargs=(device,)
    ) as pool:
        try:
            for future in as_completed([pool.submit(_compile, *job) for job in jobs]):
                plan = future.result()
                if plan is not None:
                    compiled[plan.shape].append(plan)
                progress()
        except BrokenProcessPool as error:
            raise EngineError("a process that compiles cuDNN's kernels ended by itself") from error
    return compiled


def load_plan(cudnn: Any, handle: Any, plan: CompiledPlan) -> Any:
    """Make a cuDNN graph that can be executed out of a compiled plan.

    Raises
    ------
    EngineError
        When cuDNN refuses it.
    """
    graph = cudnn.pygraph(handle=handle)
    try:
        graph.deserialize(handle, plan.plan)
    except _failures(cudnn) as error:
        reason = one_line(error)[:300]
        raise EngineError(f"cuDNN refuses a plan for {plan.shape}: {reason}") from error
    return graph


def execute(graph: Any, handle: Any, addresses: Mapping[int, int], workspace: int) -> None:
    """Enqueue a plan on the stream of a handle.

    Raises
    ------
    EngineError
        When cuDNN or CUDA fails.
    """
    try:
        graph.execute(dict(addresses), workspace, handle=handle)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"cuDNN failed: {one_line(error)[:300]}") from error


_worker_handle: Any = None
"""cuDNN handle of a process of `compile_all`."""


def _compile(shape: ConvShape, choice: Choice) -> CompiledPlan | None:
    """Compile in a process of `compile_all`; None where cuDNN cannot."""
    global _worker_handle  # noqa: PLW0603
    cudnn = import_cudnn()
    if _worker_handle is None:
        _worker_handle = cudnn.create_handle()
    try:
        graph = _describe(cudnn, _worker_handle, shape)
        knobs = {getattr(cudnn.knob_type, name): value for name, value in choice.knobs}
        graph.create_execution_plan(choice.engine, knobs)
        index = graph.get_execution_plan_count() - 1
        graph.build_plan_at_index(index)
        size = graph.get_workspace_size_plan_at_index(index)
        return CompiledPlan(shape, choice, size, graph.serialize(as_bytes=True))
    except _failures(cudnn):
        return None


def _failures(cudnn: Any) -> tuple[type[Exception], ...]:
    """What the frontend raises where cuDNN cannot do something."""
    return (RuntimeError, ValueError, cudnn.cudnnGraphNotSupportedError)


def _describe(cudnn: Any, handle: Any, shape: ConvShape) -> Any:
    """Write the graph of a layer; see `engine.backends.cudnn.graph`. y's scale is divided out."""
    types = cudnn.data_type
    real = types.FLOAT
    int8, half = types.INT8, types.HALF
    source = int8 if shape.source == "int8" else half
    exact = types.INT32 if shape.source == "int8" else real
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=source,
        intermediate_data_type=real,
        compute_data_type=real,
    )

    def tensor(uid: int, dims: list[int], kind: Any) -> Any:
        return graph.tensor(dim=dims, stride=_nhwc(dims), data_type=kind, uid=uid)

    window = shape.window
    y = graph.conv_fprop(
        image=tensor(X, [shape.batch, shape.channels, shape.height, shape.width], source),
        weight=tensor(WEIGHT, [shape.filters, shape.channels, *window.kernel], source),
        pre_padding=list(window.pads[:2]),
        post_padding=list(window.pads[2:]),
        stride=list(window.stride),
        dilation=list(window.dilation),
        compute_data_type=exact,
    )
    y.set_data_type(exact)
    channel = [1, shape.filters, 1, 1]
    y = graph.mul(a=y, b=tensor(MULTIPLIER, channel, real), compute_data_type=real)
    y = graph.add(a=y, b=tensor(BIAS, channel, real), compute_data_type=real)
    result = [shape.batch, shape.filters, shape.rows, shape.columns]
    if shape.residual:
        step = tensor(RESIDUAL_MULTIPLIER, [1, 1, 1, 1], real)
        skipped = graph.mul(a=tensor(RESIDUAL, result, int8), b=step, compute_data_type=real)
        y = graph.add(a=y, b=skipped, compute_data_type=real)
    if shape.relu:
        y = graph.relu(input=y, compute_data_type=real)
    target = int8 if shape.target == "int8" else half
    y.set_output(True).set_data_type(target).set_dim(result).set_stride(_nhwc(result)).set_uid(Y)
    graph.validate()
    graph.build_operation_graph()
    return graph


def _nhwc(dims: Sequence[int]) -> list[int]:
    """Strides in elements of [n, c, h, w] that lies as n, h, w, c."""
    _, channels, height, width = dims
    return [channels * height * width, 1, channels * width, channels]


def _by(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))

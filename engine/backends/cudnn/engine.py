"""cuDNN's fused INT8 convolutions from the image to the heads, libnms_opt.so from there on.

The ONNX graph is read into fused layers (`engine.backends.cudnn.graph`); each is run by the kernel
that was fastest on this GPU at this batch size (`engine.backends.cudnn.tuning`), and all of a batch
size are recorded as one CUDA graph. A batch is run at the next of the sizes in `batch_sizes`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.backends.cuda import Stream, gpu_index, pinned, use_gpu
from engine.backends.cudnn.graph import Convolution, Int8Graph
from engine.backends.cudnn.hopper import hopper_library, stem_constants
from engine.backends.cudnn.layers import constants as layer_constants
from engine.backends.cudnn.layers import conv_shape, groups, padded
from engine.backends.cudnn.measure import Chooser, measure_plans
from engine.backends.cudnn.plans import CompiledPlan, ConvShape, import_cudnn, load_plan
from engine.backends.cudnn.program import Kernels, Program, Run, make_program
from engine.backends.cudnn.reader import read_int8_graph
from engine.backends.cudnn.tuning import (
    Machine,
    Tuned,
    Turn,
    cache_path,
    load_cache,
    load_winners,
    save_cache,
    save_winners,
    tune,
)
from engine.backends.pipeline import Enqueue, PipelinedSession, Slot
from engine.backends.split import Split, UnsplitError, split
from engine.errors import EngineError
from engine.model import load_detector
from engine.protocol import DETECTION_FIELDS, InputSpec, corrections_of, output_shapes
from engine.support.external import model_sha256
from engine.support.files import file_sha256
from engine.support.progress import progress_bar
from graph_surgery.nms_function import OP_TYPE
from plugin_cuda.binding import Plan
from plugin_cuda.device_array import DeviceArray
from plugin_cuda.errors import PluginError
from plugin_cuda.int8_conv import conv_library_path
from plugin_cuda.int8_layers import layers_library_path, load_layers_library
from plugin_cuda.library import FLOAT16, Config, Format, library_path, workspace_size

_LOG = logging.getLogger(__name__)

_MAX_BATCH = 64
"""Largest batch, unless another is asked for."""


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Batch sizes that are prepared: 1, 2, 3, 4, 6, 8, 12, 16, 24, … and the largest itself."""
    sizes = {1, max_batch}
    power = 2
    while power <= max_batch:
        sizes |= {power, min(power * 3 // 2, max_batch)}
        power *= 2
    return tuple(sorted(sizes))


def load(
    model: Path,
    *,
    device: str = "cuda",
    threads: int | None = None,
    max_batch: int | None = None,
) -> CudnnEngine:
    """Load an INT8 detector that ends in NMS_OPT_TRT, for the sizes of `batch_sizes`.

    What the tuning cache lacks of them is tuned first, which takes minutes.

    Parameters
    ----------
    model
        ONNX file of ``engine quantize``.
    device
        ``cuda`` or ``cuda:N``.
    threads
        Not used.
    max_batch
        Largest batch; None: 64.

    Raises
    ------
    EngineError
        When something is missing on the machine, the file is no such detector, or a layer of it
        cannot be run in INT8.
    """
    del threads
    batches = batch_sizes(max_batch or _MAX_BATCH)
    index = gpu_index(device)
    if index is None:
        raise EngineError(f"cudnn runs on a GPU, not on {device!r}; use --device cuda")
    if not model.is_file():
        raise EngineError(f"{model}: no such model file")
    cudnn = import_cudnn()
    gpu = use_gpu(index)
    try:
        detector = load_detector(model)
        detector.require_any_engine()
        detector.require_version_1("the engine cudnn")
        parts = split(detector.model)
        library = load_layers_library()
    except (UnsplitError, PluginError) as error:
        raise EngineError(f"{model}: {error}") from error
    try:
        graph = read_int8_graph(parts.network)
    except EngineError as error:
        raise EngineError(f"{model}: {error}") from error
    machine = Machine(gpu.name, cudnn.backend_version_string(), cudnn.__version__)
    hopper = hopper_library(gpu.compute_capability)
    with ExitStack() as held:
        owner = held.enter_context(closing(Stream()))
        handle = cudnn.create_handle()
        held.callback(cudnn.destroy_handle, handle)
        path = cache_path(machine)
        with closing(Stream()) as scratch, closing(Turn(path)) as turn:
            cudnn.set_stream(handle, scratch.handle)
            plans = _plans(
                cudnn, handle, graph, batches, machine, turn=turn, stream=scratch, device=index
            )
            kernels = Kernels(handle, library, plans, _upload_constants(owner, graph))
            known = partial(load_winners, path, machine)
            choose = Chooser(kernels, hopper, graph, scratch, known, take_turn=turn.take)
            before = dict(choose.winners)
            try:
                programs = {
                    batch: make_program(graph, batch, partial(choose, batch)) for batch in batches
                }
            except PluginError as error:
                raise EngineError(f"{model}: {error}") from error
            if choose.winners != before:
                save_winners(path, machine, choose.winners)
        image = graph.tensors[graph.image]
        spec = InputSpec(
            graph.image, (image.channels, image.height, image.width), "int8", image.scale
        )
        manifest = {
            "backend": "cudnn",
            "version": machine.cudnn,
            "frontend_version": machine.frontend,
            "gpu": gpu.name,
            "running_on": gpu.identity,
            "compute_capability": gpu.compute_capability,
            "device": f"cuda:{index}",
            "model": model.name,
            "onnx_sha256": model_sha256(model),
            "input": spec.to_dict(),
            "keep_top_k": parts.config.keep_top_k,
            "outputs": output_shapes(parts.config.keep_top_k),
            "first_label": detector.first_label,
            **corrections_of(detector.metadata),
            "max_batch": batches[-1],
            "batch_sizes": list(batches),
            "nms": library_path().name,
            "nms_sha256": file_sha256(library_path()),
            "libraries": {
                layers_library_path().name: file_sha256(layers_library_path()),
                **({conv_library_path().name: hopper.sha256} if hopper else {}),
            },
            "kernels": {step.name: step.candidate.name for step in programs[batches[-1]].steps},
        }
        engine = CudnnEngine(
            spec, batches[-1], manifest, graph, programs, parts, kernels, cudnn, index
        )
        weakref.finalize(engine, held.pop_all().close).atexit = False
    return engine


@dataclass(frozen=True)
class CudnnEngine:
    """A detector on a GPU; see `engine.protocol.Engine`. Made by `load`.

    Attributes
    ----------
    graph, programs, parts
        The fused layers; how they are run at each batch size; what follows them.
    """

    input_spec: InputSpec
    max_batch: int
    manifest: Mapping[str, object]
    graph: Int8Graph = field(repr=False)
    programs: Mapping[int, Program] = field(repr=False)
    parts: Split = field(repr=False)
    _kernels: Kernels = field(repr=False)
    _cudnn: Any = field(repr=False)
    device: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def session(self) -> CudnnSession:
        """Open a session: streams and buffers of its own; the weights are shared."""
        with self._lock:  # a handle of cuDNN serves one stream at a time
            return CudnnSession(self)

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Page-locked memory, from which images are copied while the host goes on."""
        use_gpu(self.device)
        return pinned(shape, dtype)

    tells_layers = True

    def layer_times(self, batch: int) -> tuple[int, Mapping[str, float]]:
        """See `engine.protocol.TellsLayers`."""
        from engine.backends.cudnn.times import step_times  # which imports this module

        batch = self.prepared(batch)
        names = [*(step.name for step in self.programs[batch].steps), OP_TYPE]
        return batch, dict(zip(names, step_times(self, batch), strict=True))

    def prepared(self, count: int) -> int:
        """Batch size at which so many images are run."""
        return next(batch for batch in self.programs if batch >= count)

    @property
    def nms_config(self) -> Config:
        """What libnms_opt.so is told: heads lie merged, NHWC, in float16."""
        names = list(self.parts.heads)
        levels = []
        for level, *pair in zip(
            self.parts.config.levels,
            names[: len(names) // 2],
            names[len(names) // 2 :],
            strict=True,
        ):
            loc, conf = (
                Format(FLOAT16, padded(self.graph.tensors[self.graph.heads[name].tensor].channels))
                for name in pair
            )
            levels.append(replace(level, loc=loc, conf=conf))
        return replace(self.parts.config, levels=tuple(levels))

    def reserve(self, stream: Stream) -> Memory:
        """Allocate what one stream of execution needs besides its slots."""
        programs = self.programs.values()
        library, config = self.parts.library, self.nms_config
        room = max(
            workspace_size(config, self.max_batch, library),
            *(program.workspace_bytes for program in programs),
        )
        memory = Memory(
            arena=stream.device(max(program.arena.size for program in programs)),
            workspace=stream.device(room),
            workspace_bytes=room,
            priors=stream.device(self.parts.priors.nbytes),
        )
        stream.upload(memory.priors, self.parts.priors)
        stream.synchronize()
        return memory

    def bind(self, batch: int, memory: Memory, slot: Slot, stream: Stream) -> list[Run]:
        """Bind everything of a batch size to memory: every step, then NMS."""
        self._cudnn.set_stream(self._kernels.handle, stream.handle)
        program = self.programs[batch]
        runs = program.bind(slot.images, memory.arena, memory.workspace)
        heads = [self.graph.heads[name] for name in self.parts.heads]
        addresses = [
            memory.arena + program.arena.offsets[head.tensor] + 2 * head.first for head in heads
        ]
        config, library = self.nms_config, self.parts.library
        loc, conf = addresses[: len(heads) // 2], addresses[len(heads) // 2 :]
        plan = Plan(config, batch, tuple(loc), tuple(conf), memory.priors, library)
        rows = (batch, config.keep_top_k, DETECTION_FIELDS)
        nms = plan.bind(
            DeviceArray(slot.detections, rows, np.dtype(np.float32)),
            DeviceArray(slot.counts, (batch,), np.dtype(np.int32)),
            DeviceArray(memory.workspace, (memory.workspace_bytes,), np.dtype(np.uint8)),
        )
        return [*runs, nms]


@dataclass(frozen=True)
class Memory:
    """Device memory of a stream of execution: addresses, and the size of the workspace."""

    arena: int
    workspace: int
    workspace_bytes: int
    priors: int


class CudnnSession(PipelinedSession):
    """A stream of execution; see `engine.protocol.Session`."""

    def __init__(self, engine: CudnnEngine) -> None:
        self._engine = engine
        rows = engine.parts.config.keep_top_k
        super().__init__(engine.device, engine.input_spec, engine.max_batch, rows, self._prepare)

    def _prepare(self, stream: Stream, slots: Sequence[Slot]) -> Enqueue:
        """Record a CUDA graph for every batch size and slot."""
        try:
            return self._record(stream, slots)
        except PluginError as error:
            raise EngineError(str(error)) from error

    def _record(self, stream: Stream, slots: Sequence[Slot]) -> Enqueue:
        engine = self._engine
        self._memory = engine.reserve(stream)
        graphs = {}
        for batch in engine.programs:
            for number, slot in enumerate(slots):
                runs = engine.bind(batch, self._memory, slot, stream)

                def work(runs: Sequence[Run] = runs) -> None:
                    for run in runs:
                        run(stream.handle)

                if number == 0:  # loads every kernel, which must not happen while recording
                    work()
                    stream.synchronize()
                graphs[batch, number] = stream.capture(work)

        def enqueue(count: int, number: int) -> None:
            graphs[engine.prepared(count), number]()

        return enqueue

    def heads(self, count: int) -> dict[str, NDArray[np.float32]]:
        """Head tensors of the last batch, of so many images: float32 [N, C, h, w], by ONNX name."""
        engine = self._engine
        program = engine.programs[engine.prepared(count)]
        found = {}
        for name in engine.parts.heads:
            head = engine.graph.heads[name]
            tensor = engine.graph.tensors[head.tensor]
            rows = (program.batch, tensor.height, tensor.width, padded(tensor.channels))
            values = np.empty(rows, np.float16)
            self._work.download(values, self._memory.arena + program.arena.offsets[head.tensor])
            self._work.synchronize()
            values = values[:count, ..., head.first : head.first + head.channels]
            found[name] = values.transpose(0, 3, 1, 2).astype(np.float32)
        return found


def _plans(
    cudnn: Any,
    handle: Any,
    graph: Int8Graph,
    batches: Sequence[int],
    machine: Machine,
    *,
    turn: Turn,
    stream: Stream,
    device: int,
) -> dict[ConvShape, tuple[CompiledPlan, Any]]:
    """The fastest plan of every shape, ready to be executed: from the cache, else tuned."""
    layers = [
        {batch: conv_shape(graph, layer, batch) for batch in batches}
        for layer in graph.layers
        if isinstance(layer, Convolution)
    ]
    shapes = {shape for layer in layers for shape in layer.values()}
    path = cache_path(machine)
    ready: dict[ConvShape, tuple[CompiledPlan, Any]] = {}
    known: dict[ConvShape, Tuned] = {}

    def look() -> set[ConvShape]:
        """Load what the cache knows; return what it lacks."""
        for shape, one in load_cache(path, machine, shapes - known.keys()).items():
            with suppress(EngineError):  # damaged: tuned again
                ready[shape] = one.plan, load_plan(cudnn, handle, one.plan)
                known[shape] = one
        return shapes - known.keys()

    missing = look()
    if missing and turn.take():
        missing = look()  # while this one waited, another may have found it
    if missing:
        _LOG.warning(
            "cuDNN: looking for the fastest kernels of %d shapes on %s, once; this takes minutes",
            len(missing),
            machine.gpu,
        )
        with progress_bar("cuDNN kernels") as progress:
            time = partial(measure_plans, cudnn, handle, stream)
            keep = partial(save_cache, path, machine)
            tuned = tune(
                cudnn, handle, layers, known, time, device=device, progress=progress, keep=keep
            )
        for shape in missing:
            ready[shape] = tuned[shape].plan, load_plan(cudnn, handle, tuned[shape].plan)
    return ready


def _upload_constants(stream: Stream, graph: Int8Graph) -> dict[str, dict[int, int]]:
    """Copy the constants of every convolution to the GPU."""
    found: dict[str, dict[int, int]] = {}
    for group in groups(graph):
        layer = group[0]
        if isinstance(layer, Convolution):
            found[layer.y] = {}
            arrays = {**layer_constants(graph, layer), **stem_constants(graph, group)}
            for number, array in arrays.items():
                address = found[layer.y][number] = stream.device(array.nbytes)
                stream.upload(address, array)
    stream.synchronize()
    return found

"""TensorRT and TensorRT-RTX: run an engine file on a GPU.

TensorRT 10.6 was run on an H200; TensorRT-RTX only builds here, for it knows no GPU that we had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.backends.cuda import Stream, gpu_index, pinned, use_gpu
from engine.backends.tensorrt.log import polygraphy_log
from engine.backends.tensorrt.module import RTX, import_tensorrt
from engine.backends.tensorrt.plugins import load_plugins
from engine.errors import EngineError
from engine.manifest import (
    Machine,
    Manifest,
    check_engine,
    check_machine,
    check_plugins,
    load_manifest,
)
from engine.protocol import InputSpec, check_images
from engine.protocol import Session as _Session
from engine.support.files import write_atomically

if TYPE_CHECKING:
    import tensorrt
    import tensorrt_rtx

_OUTPUTS = {"detections": np.float32, "num_detections": np.int32}
"""The detector's outputs and their types; `engine.backends.tensorrt.build` builds nothing else."""


def load_tensorrt(model: Path, *, device: str = "cuda", threads: int | None = None) -> Engine:
    """Load an engine file that ``engine build --backend tensorrt`` wrote; see `load`."""
    del threads
    return load("tensorrt", model, device)


def load_tensorrt_rtx(model: Path, *, device: str = "cuda", threads: int | None = None) -> Engine:
    """Load an engine file that ``engine build --backend tensorrt-rtx`` wrote; see `load`."""
    del threads
    return load(RTX, model, device)


def load(backend: str, model: Path, device: str) -> Engine:
    """Load an engine file, once its manifest says that it can run here.

    Parameters
    ----------
    backend
        ``tensorrt`` or ``tensorrt-rtx``.
    model
        Engine file, with its manifest beside it.
    device
        ``cuda`` or ``cuda:N``.

    Raises
    ------
    EngineError
        When the manifest is missing or a line of it does not hold: the backend and its version, the
        GPU, the plugin libraries, the engine file; when TensorRT is not installed or refuses.
    """
    manifest = load_manifest(model)
    plan = check_engine(model, manifest)
    libraries = check_plugins(model, manifest)
    if manifest.options.get("strip_plan"):
        raise EngineError(
            f"{model}: its weights were stripped, and no command here puts weights into a plan; "
            "build it without --strip-plan"
        )
    if manifest.options.get("weight_streaming"):  # an option until 0.1
        raise EngineError(
            f"{model}: built with --weight-streaming, which is no option any more: TensorRT 10.6 "
            "does not load such plans of these networks; build it again"
        )
    index = gpu_index(device)
    if index is None:
        raise EngineError(f"{backend} runs on a GPU, not on {device!r}; use --device cuda")
    trt = import_tensorrt(backend)
    gpu = use_gpu(index)
    here = Machine(backend, str(trt.__version__), gpu.name, gpu.compute_capability)
    check_machine(model, manifest, here)
    load_plugins(trt, libraries)
    engine = _deserialize(trt, plan, model, manifest)
    described = {**manifest.to_dict(), "device": f"cuda:{index}"}
    return Engine(manifest.input, manifest.max_batch, described, trt, engine, index)


@dataclass(frozen=True)
class Engine:
    """An engine on a GPU; see `engine.protocol.Engine`. Made by `load`."""

    input_spec: InputSpec
    max_batch: int
    manifest: Mapping[str, object]
    _trt: Any = field(repr=False)
    _engine: tensorrt.ICudaEngine = field(repr=False)
    _device: int = 0

    def session(self, *, cuda_graphs: bool = False) -> Session:
        """Open a session: a stream, a context and buffers of its own.

        Parameters
        ----------
        cuda_graphs
            Record the work of each batch size when it comes for the first time, and replay it.
        """
        use_gpu(self._device)  # the current device is a matter of each thread
        if self.manifest["backend"] == RTX:
            context = _rtx_context(self._trt, self._engine, cuda_graphs)
            return Session(self, context, capture=False)
        context = _made(self._engine.create_execution_context)
        return Session(self, context, capture=cuda_graphs)

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate page-locked memory."""
        use_gpu(self._device)
        return pinned(shape, dtype)

    def output_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an output at the largest batch."""
        _, *sizes = self._engine.get_tensor_shape(name)
        return (self.max_batch, *sizes)


class Session(_Session):
    """A stream of execution; see `engine.protocol.Session`.

    One batch is under way at a time, and a second session overlaps its copies with the work of the
    first.
    """

    depth = 1

    def __init__(
        self, engine: Engine, context: tensorrt.IExecutionContext, *, capture: bool
    ) -> None:
        self._engine = engine
        self._context = context
        self._spec = engine.input_spec
        self._min_batch = int(str(engine.manifest["min_batch"]))
        self._capture = capture
        self._replays: dict[int, Callable[[], None]] = {}
        self._batch: int | None = None
        self._count = 0
        self._stream = Stream()
        self._outputs = {
            name: pinned(engine.output_shape(name), dtype) for name, dtype in _OUTPUTS.items()
        }
        image_bytes = int(np.prod(self._spec.shape)) * np.dtype(self._spec.dtype).itemsize
        sizes = {name: array.nbytes for name, array in self._outputs.items()}
        sizes[self._spec.name] = engine.max_batch * image_bytes
        self._addresses: dict[str, int] = {}
        for name, size in sizes.items():
            self._addresses[name] = self._stream.device(size)
            if not context.set_tensor_address(name, self._addresses[name]):
                raise EngineError(f"TensorRT refuses the buffer of {name}")

    def submit(self, images: Sequence[NDArray[np.generic]]) -> None:
        """Start a batch; see `engine.protocol.Session.submit`."""
        if self._count:
            raise EngineError("the result of the last batch was not taken")
        count = check_batch(images, self._spec, self._engine.max_batch)
        batch = max(count, self._min_batch)
        address = self._addresses[self._spec.name]
        for run in images:
            self._stream.upload(address, run)
            address += run.nbytes
        if batch in self._replays:
            self._replays[batch]()
        else:
            self._run(batch)
            if self._capture:  # the run above has done what must not happen while recording
                self._stream.synchronize()
                self._replays[batch] = self._stream.capture(lambda: self._run(batch))
        self._count = count

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Wait for the batch; see `engine.protocol.Session.result`."""
        if not self._count:
            raise EngineError("no batch was submitted")
        self._stream.synchronize()
        detections, counts = (self._outputs[name][: self._count].copy() for name in _OUTPUTS)
        self._count = 0
        return detections, counts

    def close(self) -> None:
        """Release the stream and the buffers."""
        self._stream.close()

    def _run(self, batch: int) -> None:
        context = self._context
        if batch != self._batch:
            if not context.set_input_shape(self._spec.name, (batch, *self._spec.shape)):
                raise EngineError(f"TensorRT refuses a batch of {batch}")
            self._batch = batch
        if not context.execute_async_v3(self._stream.handle):
            raise EngineError("TensorRT could not start the batch; see its messages above")
        for name, array in self._outputs.items():
            self._stream.download(array[:batch], self._addresses[name])


def check_batch(images: Sequence[NDArray[np.generic]], spec: InputSpec, max_batch: int) -> int:
    """Check a batch, given as runs of images, against what an engine takes.

    Returns
    -------
    int
        Images of the batch.

    Raises
    ------
    EngineError
        When its dtype, shape or number is another.
    """
    count = check_images(images, spec, "engine")
    if count > max_batch:
        raise EngineError(
            f"a batch of {count} images, but the engine's profile ends at {max_batch}; "
            "build it with a larger max batch"
        )
    return count


def write_layer_info(trt: Any, plan: bytes, path: Path) -> None:
    """Write the engine inspector's JSON of a plan.

    Raises
    ------
    EngineError
        When TensorRT cannot load the plan on this GPU, or the file cannot be written.
    """
    with polygraphy_log("warning") as errors:
        engine: tensorrt.ICudaEngine | None = _runtime(trt).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"cannot read the layers of the new engine: {errors.first('no cause')}")
    inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise EngineError(f"{path}: cannot write it: {error.strerror}") from error


def _runtime(trt: Any) -> tensorrt.Runtime:
    from polygraphy.backend.trt import get_trt_logger

    return trt.Runtime(get_trt_logger())


def _deserialize(trt: Any, plan: bytes, path: Path, manifest: Manifest) -> tensorrt.ICudaEngine:
    with polygraphy_log("warning") as errors:
        runtime: tensorrt.Runtime = _runtime(trt)
        if manifest.options.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # such a plan brings its lean runtime
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{path}: TensorRT cannot load it: {errors.first('it gave no cause')}")
    return engine


def _rtx_context(
    rtx: Any, engine: tensorrt_rtx.ICudaEngine, cuda_graphs: bool
) -> tensorrt_rtx.IExecutionContext:
    """TensorRT-RTX compiles kernels on first use, and captures graphs by itself after that."""
    config: tensorrt_rtx.IRuntimeConfig = engine.create_runtime_config()
    if cuda_graphs:
        config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return _made(lambda: engine.create_execution_context(config))


def _made(create: Callable[[], tensorrt.IExecutionContext | None]) -> tensorrt.IExecutionContext:
    with polygraphy_log("warning") as errors:
        context = create()
    if context is None:
        cause = errors.first("too little GPU memory?")
        raise EngineError(f"TensorRT could not make a context: {cause}")
    return context

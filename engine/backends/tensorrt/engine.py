"""TensorRT and TensorRT-RTX: run an engine file on a GPU.

TensorRT 10.6 was run on an H200; TensorRT-RTX only builds here, for it knows no GPU that we had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import DTypeLike, NDArray

from engine.backends.cuda import Stream, gpu_index, pinned, use_gpu
from engine.backends.pipeline import Enqueue, PipelinedSession, Slot
from engine.backends.tensorrt.log import polygraphy_log
from engine.backends.tensorrt.module import RTX, import_tensorrt
from engine.backends.tensorrt.plugins import load_plugins
from engine.errors import EngineError, SessionLostError
from engine.manifest import (
    Machine,
    Manifest,
    check_engine,
    check_machine,
    check_plugins,
    load_manifest,
    manifest_path,
)
from engine.protocol import DETECTIONS, NUM_DETECTIONS, InputSpec
from engine.support.files import write_atomically

if TYPE_CHECKING:
    import tensorrt


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
    if not manifest_path(model).exists():
        import_tensorrt(backend)  # where it is missing, that is what to hear first
    manifest = load_manifest(model)
    plan = check_engine(model, manifest)
    libraries = check_plugins(model, manifest)
    if manifest.options.get("strip_plan"):
        raise EngineError(
            f"{model}: its weights were stripped; put weights into it with 'engine refit'"
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
    engine = deserialize(trt, plan, model, manifest)
    described = {**manifest.to_dict(), "device": f"cuda:{index}", "running_on": gpu.identity}
    return Engine(manifest.input, manifest.max_batch, described, trt, engine, index)


@dataclass(frozen=True)
class Engine:
    """An engine on a GPU; see `engine.protocol.Engine`. Made by `load`.

    Attributes
    ----------
    trt, plan, device
        TensorRT's module, its engine, and the number of the GPU.
    """

    input_spec: InputSpec
    max_batch: int
    manifest: Mapping[str, object]
    trt: Any = field(repr=False)
    plan: tensorrt.ICudaEngine = field(repr=False)
    device: int = 0

    def session(self) -> PipelinedSession:
        """Open a session: streams, contexts and buffers of its own."""
        _, rows, _ = self.plan.get_tensor_shape(DETECTIONS)
        return PipelinedSession(
            self.device,
            self.input_spec,
            self.max_batch,
            rows,
            self._prepare,
            too_large=(
                f"but the engine's profile ends at {self.max_batch}; build it with a larger max "
                "batch"
            ),
        )

    tells_layers = True

    def layer_times(self, batch: int) -> tuple[int, Mapping[str, float]]:
        """See `engine.protocol.TellsLayers`."""
        from engine.backends.tensorrt.layers import describe_plan  # which imports this module

        batch = max(batch, int(str(self.manifest["min_batch"])))
        return batch, {layer.name: layer.ms for layer in describe_plan(self, batch).layers}

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate page-locked memory."""
        use_gpu(self.device)
        return pinned(shape, dtype)

    def _prepare(self, stream: Stream, slots: Sequence[Slot]) -> Enqueue:
        """Make a context for each batch size as it comes; they share the memory of one.

        A CUDA graph holds for the shapes that its context had, so each size has its own context.
        The first batch of a size in a slot is started kernel by kernel, which also does what must
        not happen while recording; the later ones replay what was recorded behind it.
        """
        least = int(str(self.manifest["min_batch"]))
        memory = stream.device(self.plan.device_memory_size_v2)
        # TensorRT-RTX compiles kernels for a shape as it goes: not while recording
        recordable = self.manifest["backend"] != RTX
        contexts: dict[int, tensorrt.IExecutionContext] = {}
        replays: dict[tuple[int, int], Callable[[], None]] = {}

        def enqueue(count: int, number: int) -> None:
            batch = max(count, least)
            if replay := replays.get((batch, number)):
                replay()
                return
            if batch not in contexts:
                contexts[batch] = make_context(self.trt, self.plan, memory, self.input_spec, batch)
            context, slot = contexts[batch], slots[number]
            addresses = {DETECTIONS: slot.detections, NUM_DETECTIONS: slot.counts}
            set_addresses(context, {self.input_spec.name: slot.images, **addresses})
            start(context, stream)
            if recordable:
                replays[batch, number] = stream.capture(lambda: start(context, stream))

        return enqueue


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


def deserialize(trt: Any, plan: bytes, path: Path, manifest: Manifest) -> tensorrt.ICudaEngine:
    """Load a plan of a file, or one like it.

    Raises
    ------
    EngineError
        When TensorRT refuses it.
    """
    with polygraphy_log("warning") as errors:
        runtime: tensorrt.Runtime = _runtime(trt)
        if manifest.options.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # such a plan brings its lean runtime
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{path}: TensorRT cannot load it: {errors.first('it gave no cause')}")
    return engine


def make_context(
    trt: Any, plan: tensorrt.ICudaEngine, memory: int, spec: InputSpec, batch: int
) -> tensorrt.IExecutionContext:
    """Make a context for batches of one size.

    Parameters
    ----------
    memory
        Address of ``plan.device_memory_size_v2`` bytes on the GPU.

    Raises
    ------
    EngineError
        When TensorRT cannot.
    """
    with polygraphy_log("warning") as errors:
        context: tensorrt.IExecutionContext | None = plan.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
    if context is None:
        cause = errors.first("too little GPU memory?")
        raise EngineError(f"TensorRT could not make a context: {cause}")
    context.set_device_memory(memory, plan.device_memory_size_v2)
    if not context.set_input_shape(spec.name, (batch, *spec.shape)):
        raise EngineError(f"TensorRT refuses a batch of {batch}")
    return context


def set_addresses(context: tensorrt.IExecutionContext, addresses: Mapping[str, int]) -> None:
    """Let a context read and write there.

    Raises
    ------
    EngineError
        When TensorRT refuses one.
    """
    for name, address in addresses.items():
        if not context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT refuses the buffer of {name}")


def start(context: tensorrt.IExecutionContext, stream: Stream) -> None:
    """Start a batch, or record how.

    Raises
    ------
    EngineError
        When TensorRT cannot; SessionLostError where that is the GPU's fault, which CUDA does not
        tell while a graph is recorded.
    """
    if not context.execute_async_v3(stream.handle):
        try:
            stream.synchronize()
        except SessionLostError:  # the GPU is lost, which is why
            raise
        except EngineError:
            pass
        raise EngineError("TensorRT could not start the batch; see its messages above")

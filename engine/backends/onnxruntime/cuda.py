"""ONNX Runtime's CUDA provider from the image to the heads, libnms_opt.so from there on.

Everything stays on the GPU between the image and the detections, on one stream that the host waits
for once a batch. ONNX Runtime takes a stream for an InferenceSession, not for a run, and would
otherwise wait for the GPU at the end of every run; so each session here has an InferenceSession of
its own, and with it a copy of the weights: 80 MB for SSD-ResNet34. Two sessions thus share neither
a stream nor the memory of ONNX Runtime's arena.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.backends.cuda import Stream, gpu_index, pinned, runtime, use_gpu
from engine.backends.onnxruntime.session import (
    batch_check,
    describe,
    find_provider,
    input_spec,
    open_session,
)
from engine.backends.split import Split, UnsplitError, split
from engine.errors import EngineError, one_line
from engine.model import load_detector
from engine.protocol import DETECTION_FIELDS, InputSpec, Session
from engine.support.files import file_sha256
from graph_surgery.protobuf import serialized
from plugin_cuda.binding import Plan, Run
from plugin_cuda.device_array import DeviceArray
from plugin_cuda.errors import PluginError
from plugin_cuda.library import library_path, workspace_size

if TYPE_CHECKING:
    import onnxruntime

CUDA_OPTIONS: Mapping[str, str] = {
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "prefer_nhwc": "0",
    "use_tf32": "1",
}
"""What ONNX Runtime's convolutions are told: its own defaults.

The variants in docs/measurements/onnxruntime_cuda.json differ by little. A batch of another size
than the last one plans every convolution anew, which took 0.1 to 0.7 s there.

Since release 1.20 the algorithm search tries nothing out: EXHAUSTIVE is cuDNN's heuristic of mode
B, HEURISTIC that of mode A. ``use_tf32=0`` would take the tensor cores from float16 as well. No
``enable_cuda_graph``: it would record one graph for each batch size, to save some microseconds for
each of fewer than a hundred launches.
"""

_DEVICE = "cuda"


def load_split(
    model: Path,
    *,
    device: str = _DEVICE,
    threads: int | None = None,
    options: Mapping[str, str] = CUDA_OPTIONS,
) -> SplitEngine:
    """Load a detector that ends in NMS_OPT_TRT.

    Parameters
    ----------
    model, device, threads
        As `engine.backends.onnxruntime.engine.load`.
    options
        Options of the CUDA provider, besides device and stream.

    Raises
    ------
    UnsplitError
        When the graph or the machine lacks something that only this way needs.
    EngineError
        When ONNX Runtime cannot run the model on a GPU at all.
    """
    provider = find_provider(model, device)
    detector = load_detector(model)
    detector.require_any_engine()
    parts = split(detector.model)
    try:
        runtime()
    except EngineError as error:
        raise UnsplitError(str(error)) from error
    index = gpu_index(device) or 0
    gpu = use_gpu(index)

    def open_network(**more: str) -> onnxruntime.InferenceSession:
        given = {**options, "device_id": str(index), **more}
        with serialized(parts.network) as (network, entries):
            return open_session(network, model, provider, given, threads, entries=entries)

    # opened once for its errors alone: what can be refused is refused here
    spec, max_batch = input_spec(open_network(), model)
    rows = parts.config.keep_top_k
    manifest = {
        **describe(
            model,
            device,
            threads,
            spec,
            max_batch=max_batch,
            keep_top_k=rows,
            first_label=detector.first_label,
            metadata=detector.metadata,
        ),
        "provider_options": dict(options),
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "nms": library_path().name,
        "nms_sha256": file_sha256(library_path()),
    }
    return SplitEngine(spec, max_batch, manifest, parts, open_network, index)


@dataclass(frozen=True)
class SplitEngine:
    """A detector on a GPU; see `engine.protocol.Engine`. Made by `load_split`."""

    input_spec: InputSpec
    max_batch: int | None
    manifest: Mapping[str, object]
    _split: Split = field(repr=False)
    _open: Callable[..., onnxruntime.InferenceSession] = field(repr=False)
    _device: int = 0

    def session(self) -> SplitSession:
        """Open a session: a stream, weights and buffers of its own."""
        use_gpu(self._device)  # the current device is a matter of each thread
        return SplitSession(self._split, self.input_spec, self.max_batch, self._open, self._device)

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate page-locked memory."""
        use_gpu(self._device)
        return pinned(shape, dtype)


@dataclass(frozen=True)
class _Buffers:
    """Memory for batches up to a size: page-locked arrays on the host, addresses on the GPU."""

    batch: int
    detections: NDArray[np.float32]
    counts: NDArray[np.int32]
    images_at: int
    detections_at: int
    counts_at: int
    priors_at: int
    heads_at: Mapping[str, int]
    workspace: DeviceArray


@dataclass(frozen=True)
class _Pass:
    """What runs one batch size: inputs and outputs are bound."""

    network: onnxruntime.IOBinding
    nms: Run


class SplitSession(Session):
    """A stream of execution; see `engine.protocol.Session`.

    One batch is under way at a time, and a second session overlaps its copies with the work of the
    first. The buffers grow with the largest batch
    so far. A size other than the last one takes longer: cuDNN plans every convolution anew.
    """

    depth = 1

    def __init__(
        self,
        parts: Split,
        spec: InputSpec,
        fixed_batch: int | None,
        open_network: Callable[..., onnxruntime.InferenceSession],
        device: int = 0,
    ) -> None:
        import onnxruntime as ort

        self._split = parts
        self._spec = spec
        self._fixed_batch = fixed_batch
        self._check = batch_check(spec, fixed_batch)
        self._device = device
        self._buffers: _Buffers | None = None
        self._passes: dict[int, _Pass] = {}
        self._count = 0
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._stream = Stream()
        try:
            self._network = open_network(user_compute_stream=str(self._stream.handle))
        except BaseException:
            self._stream.close()
            raise

    def submit(self, images: Sequence[NDArray[np.generic]]) -> None:
        """Start a batch; see `engine.protocol.Session.submit`."""
        if self._count:
            raise EngineError("the result of the last batch was not taken")
        count = self._check(images)
        self._stream.use_gpu()
        try:
            self._start(images, self._fixed_batch or count)
        except BaseException as error:
            self._stream.synchronize()  # what was started still uses the buffers
            if isinstance(error, PluginError):
                raise EngineError(str(error)) from error
            raise
        self._count = count

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Wait for the batch; see `engine.protocol.Session.result`."""
        if self._buffers is None or not self._count:
            raise EngineError("no batch was submitted")
        count, self._count = self._count, 0
        self._stream.synchronize()
        return self._buffers.detections[:count].copy(), self._buffers.counts[:count].copy()

    def close(self) -> None:
        """Release weights, buffers and the stream."""
        self._stream.free()  # which waits for what still uses the buffers
        self._count = 0
        self._buffers = None
        self._passes.clear()
        self._network = None  # before the stream that it works on
        self._stream.close()

    def _start(self, images: Sequence[NDArray[np.generic]], batch: int) -> None:
        """Submit a batch to the stream; nothing here waits for the GPU but a change of size."""
        stream = self._stream
        if self._buffers is None or batch > self._buffers.batch:
            self._buffers = None
            self._passes.clear()
            stream.free()
            self._buffers = self._allocate(batch)
        buffers = self._buffers
        if batch not in self._passes:
            self._passes[batch] = self._bind(buffers, batch)
        work = self._passes[batch]
        address = buffers.images_at
        for run in images:
            stream.upload(address, run)
            address += run.nbytes
        try:
            self._network.run_with_iobinding(work.network, self._options)
        except Exception as error:  # ORT's exceptions share no base class but Exception
            raise EngineError(f"ONNX Runtime failed: {one_line(error)}") from error
        work.nms(stream.handle)
        stream.download(buffers.detections[:batch], buffers.detections_at)
        stream.download(buffers.counts[:batch], buffers.counts_at)

    def _allocate(self, batch: int) -> _Buffers:
        parts, stream = self._split, self._stream
        rows = (batch, parts.config.keep_top_k, DETECTION_FIELDS)
        detections, counts = pinned(rows, np.float32), pinned((batch,), np.int32)
        image_bytes = int(np.prod(self._spec.shape)) * np.dtype(self._spec.dtype).itemsize
        room = workspace_size(parts.config, batch, parts.library)
        buffers = _Buffers(
            batch,
            detections,
            counts,
            stream.device(batch * image_bytes),
            stream.device(detections.nbytes),
            stream.device(counts.nbytes),
            stream.device(parts.priors.nbytes),
            {
                name: stream.device(batch * int(np.prod(shape)) * dtype.itemsize)
                for name, (shape, dtype) in parts.heads.items()
            },
            DeviceArray(stream.device(room), (room,), np.dtype(np.uint8)),
        )
        stream.upload(buffers.priors_at, parts.priors)
        return buffers

    def _bind(self, buffers: _Buffers, batch: int) -> _Pass:
        parts = self._split
        binding = self._network.io_binding()
        shape = (batch, *self._spec.shape)
        dtype, device = np.dtype(self._spec.dtype).type, self._device
        binding.bind_input(self._spec.name, _DEVICE, device, dtype, shape, buffers.images_at)
        for name, (head, head_dtype) in parts.heads.items():
            address = buffers.heads_at[name]
            place = (_DEVICE, device, head_dtype.type, (batch, *head), address)
            binding.bind_output(name, *place)
        heads = tuple(buffers.heads_at.values())
        levels = len(parts.config.levels)
        plan = Plan(
            parts.config, batch, heads[:levels], heads[levels:], buffers.priors_at, parts.library
        )
        rows = (batch, *buffers.detections.shape[1:])
        nms = plan.bind(
            DeviceArray(buffers.detections_at, rows, buffers.detections.dtype),
            DeviceArray(buffers.counts_at, (batch,), buffers.counts.dtype),
            buffers.workspace,
        )
        return _Pass(binding, nms)

"""GPU memory that a client shares with a Triton server on its host.

Run on one H200 with Triton 2.51 and its TensorRT backend.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from numpy.typing import DTypeLike, NDArray

from engine.backends.cuda import Stream, check, pinned, runtime, use_gpu
from engine.backends.triton.memory import CALL_SECONDS
from engine.errors import EngineError
from engine.support.leaving import on_leaving

_LOG = logging.getLogger(__name__)


class CudaMemory:
    """Images are copied to the GPU by the client, and the server reads them there.

    A `engine.backends.triton.memory.Transport`.

    Parameters
    ----------
    client
        ``tritonclient.grpc.InferenceServerClient``.
    device
        Number of the GPU.
    """

    name = "CUDA shared memory"

    def __init__(self, client: Any, device: int) -> None:
        self._client = client
        self._device = device

    @staticmethod
    def negotiate(client: Any, device: int) -> CudaMemory | None:
        """Let the server open a small block; None when this host has no GPU or it cannot."""
        memory = CudaMemory(client, device)
        try:
            memory.place(1).close()
        except EngineError as error:
            _LOG.info("no CUDA shared memory with this server: %s", error)
            return None
        return memory

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate pinned memory."""
        return pinned(shape, dtype)

    def place(self, size: int) -> CudaPlace:
        """See `engine.backends.triton.memory.Transport.place`."""
        use_gpu(self._device)
        return CudaPlace(self._client, self._device, size)


class CudaPlace:
    """Memory on the GPU for one request; a `engine.backends.triton.memory.Place`."""

    def __init__(self, client: Any, device: int, size: int) -> None:
        from tritonclient.utils import InferenceServerException

        self._client = client
        self._device = device
        self._region = f"ssd-resnet34-{uuid.uuid4().hex}"
        self._stream = Stream()
        try:
            self._address = self._stream.device(size)
            handle = check(runtime().cudaIpcGetMemHandle(self._address))
            client.register_cuda_shared_memory(
                self._region,
                base64.b64encode(bytes(handle.reserved)),
                device,
                size,
                client_timeout=CALL_SECONDS,
            )
        except InferenceServerException as error:
            self._stream.close()
            raise EngineError(str(error)) from error
        on_leaving(self._unregister)

    def put(self, images: Sequence[NDArray[Any]]) -> tuple[str, int]:
        """See `engine.backends.triton.memory.Place.put`."""
        check(runtime().cudaSetDevice(self._device))
        address = self._address
        for run in images:
            self._stream.upload(address, run)
            address += run.nbytes
        self._stream.synchronize()  # the server knows nothing of the stream
        return self._region, 0

    def close(self) -> None:
        """Have the server let go of the memory, and free it."""
        self._unregister()
        self._stream.close()

    def _unregister(self) -> None:
        from tritonclient.utils import InferenceServerException

        with contextlib.suppress(InferenceServerException):  # gone, or told before
            self._client.unregister_cuda_shared_memory(self._region, client_timeout=CALL_SECONDS)

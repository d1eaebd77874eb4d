"""The little of CUDA that the engines on a GPU need, through cuda-python.

Everything here needs a GPU; its test passed on one H100 and one H200 with cuda-bindings 13.3.
"""

from __future__ import annotations

import ctypes
import math
import re
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.errors import EngineError, SessionLostError

_LOST = frozenset(
    {
        "cudaErrorDevicesUnavailable",
        "cudaErrorNoDevice",
        "cudaErrorECCUncorrectable",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorContained",
        "cudaErrorUnknown",  # what calls return once a GPU has fallen off the bus
    }
)
"""Errors that tell of a broken GPU. Those that a program's own fault can cause (an illegal address,
a failed launch) are none: another GPU would only hide it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes
    ----------
    name, compute_capability
        Model, and as ``9.0``.
    index
        Its number among those that the process sees.
    uuid
        As ``nvidia-smi -L`` shows it: ``GPU-…``.
    pci_bus_id
        As ``0000:1b:00.0``.
    """

    name: str
    compute_capability: str
    index: int = 0
    uuid: str = ""
    pci_bus_id: str = ""

    def __str__(self) -> str:
        """Return it as messages name it."""
        return f"cuda:{self.index} ({self.name}, {self.uuid})"

    @property
    def identity(self) -> dict[str, object]:
        """What a manifest says of the GPU that an engine runs on, beside its model."""
        return {"index": self.index, "name": self.name, "uuid": self.uuid, "pci": self.pci_bus_id}


def runtime() -> Any:
    """Import the CUDA runtime binding.

    Raises
    ------
    EngineError
        When it is not installed.
    """
    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        raise EngineError(
            "engines on a GPU need the CUDA bindings: pip install cuda-bindings"
        ) from error
    return cuda


def check(result: tuple[Any, ...]) -> Any:
    """Unpack what a CUDA call returned: (error, value, ...).

    Returns
    -------
    value
        The value, or None for a call that returns only an error code.

    Raises
    ------
    EngineError
        When the call failed.
    SessionLostError
        When it failed because the GPU did.
    """
    error, *values = result
    if int(error):
        _, text = runtime().cudaGetErrorString(error)
        kind = SessionLostError if error.name in _LOST else EngineError
        raise kind(f"CUDA: {text.decode()} ({error.name})")
    return values[0] if values else None


def gpu_index(device: str) -> int | None:
    """Return the number of the GPU that ``cuda`` (the first one) or ``cuda:N`` names, else None."""
    found = re.fullmatch(r"cuda(?::(\d+))?", device, re.ASCII)
    return None if found is None else int(found[1] or 0)


def pci_bus_id(device: int) -> str:
    """PCI address of a GPU, as ``0000:1b:00.0``.

    Raises
    ------
    EngineError
        When there is no such GPU.
    """
    text: bytes = check(runtime().cudaDeviceGetPCIBusId(32, device))
    return text.split(b"\0")[0].decode().lower()  # what follows the end is not always zeros


def visible_gpus() -> tuple[int, ...]:
    """Numbers of all GPUs that this process sees, of which there is at least one.

    Raises
    ------
    EngineError
        When there is none, or no driver.
    """
    count: int = check(runtime().cudaGetDeviceCount())
    if not count:
        raise EngineError("CUDA: no GPU is visible")
    return tuple(range(count))


def describe_gpu(device: int) -> Gpu:
    """Describe a GPU.

    Raises
    ------
    EngineError
        When there is no such GPU or no driver for it.
    """
    try:
        properties = check(runtime().cudaGetDeviceProperties(device))
        address = pci_bus_id(device)
    except EngineError as error:
        raise type(error)(f"no CUDA device {device} can be used: {error}") from error
    name = properties.name.rstrip(b"\0").decode()
    capability = f"{properties.major}.{properties.minor}"
    identity = uuid.UUID(bytes=bytes(properties.uuid.bytes))
    return Gpu(name, capability, device, f"GPU-{identity}", address)


def use_gpu(device: int) -> Gpu:
    """Make a GPU the current one of this thread, and describe it.

    Raises
    ------
    EngineError
        When there is no such GPU or no driver for it.
    """
    try:
        check(runtime().cudaSetDevice(device))
    except EngineError as error:
        raise type(error)(f"no CUDA device {device} can be used: {error}") from error
    return describe_gpu(device)


def pinned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Allocate page-locked host memory, from and to which copies of every GPU are asynchronous.

    It is freed with the last array that refers to it.

    Raises
    ------
    EngineError
        When there is none left.
    """
    cuda = runtime()
    size = math.prod(shape) * np.dtype(dtype).itemsize
    address = int(check(cuda.cudaHostAlloc(size, cuda.cudaHostAllocPortable)))
    buffer = (ctypes.c_byte * size).from_address(address)
    # the arrays refer to the buffer; at the end of the process the driver frees the memory itself
    weakref.finalize(buffer, cuda.cudaFreeHost, address).atexit = False
    return np.frombuffer(memoryview(buffer), dtype).reshape(shape)


class Event:
    """A moment on a stream."""

    def __init__(self, *, timing: bool = False) -> None:
        self._cuda = runtime()
        flags = self._cuda.cudaEventDefault if timing else self._cuda.cudaEventDisableTiming
        self.handle = int(check(self._cuda.cudaEventCreateWithFlags(flags)))

    def synchronize(self) -> None:
        """Wait for it on the host."""
        check(self._cuda.cudaEventSynchronize(self.handle))

    def elapsed_ms(self, start: Event) -> float:
        """Milliseconds since another event; both have to be over and made with `timing`."""
        return float(check(self._cuda.cudaEventElapsedTime(start.handle, self.handle)))

    def close(self) -> None:
        """Release it."""
        self._cuda.cudaEventDestroy(self.handle)


class Stream:
    """A CUDA stream and what is to be released with it."""

    def __init__(self) -> None:
        self._cuda = runtime()
        self._release: list[Callable[[], object]] = []
        self._device = int(check(self._cuda.cudaGetDevice()))
        self.handle = int(check(self._cuda.cudaStreamCreate()))
        self._release.append(lambda: self._cuda.cudaStreamDestroy(self.handle))

    def device(self, size: int) -> int:
        """Allocate bytes on the GPU; return their address."""
        address = int(check(self._cuda.cudaMalloc(size)))
        self._release.append(lambda: self._cuda.cudaFree(address))
        return address

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a C-contiguous host array to the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = array.ctypes.data
        check(self._cuda.cudaMemcpyAsync(address, source, array.nbytes, kind, self.handle))

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy from the GPU to a C-contiguous host array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        target = array.ctypes.data
        check(self._cuda.cudaMemcpyAsync(target, address, array.nbytes, kind, self.handle))

    def event(self, *, timing: bool = False) -> Event:
        """Make an event that is released with the stream."""
        event = Event(timing=timing)
        self._release.append(event.close)
        return event

    def record(self, event: Event) -> None:
        """Let an event be the moment when everything submitted so far is done."""
        check(self._cuda.cudaEventRecord(event.handle, self.handle))

    def wait(self, event: Event) -> None:
        """Let everything submitted from now on wait for an event of any stream."""
        check(self._cuda.cudaStreamWaitEvent(self.handle, event.handle, 0))

    def use_gpu(self) -> None:
        """Make its GPU the current one of this thread, which would else be the first one."""
        check(self._cuda.cudaSetDevice(self._device))

    def synchronize(self) -> None:
        """Wait until everything submitted is done, in any thread."""
        self.use_gpu()
        check(self._cuda.cudaStreamSynchronize(self.handle))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what a function submits as a CUDA graph; return a function that replays it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(self._cuda.cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        finally:  # a capture must end, also when the work failed
            ended = self._cuda.cudaStreamEndCapture(self.handle)
        graph = check(ended)
        executable = check(self._cuda.cudaGraphInstantiate(graph, 0))
        check(self._cuda.cudaGraphDestroy(graph))
        self._release.append(lambda: self._cuda.cudaGraphExecDestroy(executable))
        return lambda: check(self._cuda.cudaGraphLaunch(executable, self.handle))

    def free(self) -> None:
        """Wait, then release everything but the stream; nothing when that is closed."""
        if not self._release:
            return
        self._cuda.cudaStreamSynchronize(self.handle)
        while len(self._release) > 1:
            self._release.pop()()

    def close(self) -> None:
        """Release everything, as `free` does, and then the stream."""
        self.free()
        while self._release:
            self._release.pop()()

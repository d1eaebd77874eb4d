"""Memory that a client shares with Triton servers on its host, so that no image is sent.

A block is a file in /dev/shm. It loses its name as soon as the servers have opened it, so nothing
is left behind whatever happens to this process; what a server has mapped it keeps until it is told.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.support.leaving import on_leaving

CALL_SECONDS = 10.0
"""Time for a call to a server that computes nothing."""

_PARTING_SECONDS = 2.0  # the server may be gone

_LOG = logging.getLogger(__name__)
_FOLDER = Path("/dev/shm")  # noqa: S108
_servers: weakref.WeakSet[SystemMemory] = weakref.WeakSet()
_lock = threading.RLock()


class Place(Protocol):
    """Where the images of one request lie while it is in flight."""

    def put(self, images: Sequence[NDArray[Any]]) -> tuple[str, int] | None:
        """Bring runs of images to where the server sees them.

        Returns
        -------
        region, offset
            Name of the memory as the server knows it, and bytes from its begin to the first image;
            None: they have to be sent.
        """
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


class Transport(Protocol):
    """How images get to one server."""

    name: str

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate memory for images, see `engine.protocol.Engine.host_array`."""
        ...

    def place(self, size: int) -> Place:
        """Make room for the images of one request, which have `size` bytes at most."""
        ...


class SentImages:
    """Images are sent with the requests; a `Transport` and its `Place`."""

    name = "gRPC"

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate ordinary memory."""
        return np.empty(shape, dtype)

    def place(self, size: int) -> SentImages:
        """Nothing is needed."""
        del size
        return self

    def put(self, images: Sequence[NDArray[Any]]) -> None:
        """Leave the images where they are."""
        del images

    def close(self) -> None:
        """Nothing to release."""


class SystemMemory:
    """Images lie in memory that the server on this host has mapped; a `Transport`.

    Parameters
    ----------
    client
        ``tritonclient.grpc.InferenceServerClient``.
    """

    name = "system shared memory"

    def __init__(self, client: Any) -> None:
        self._client = client
        self._regions: dict[int, str] = {}  # by the address of the block
        self._freed: list[str] = []

    @staticmethod
    def negotiate(client: Any) -> SystemMemory | None:
        """Let the server open a small block; None when it cannot, as on another host."""
        memory = SystemMemory(client)
        block = shared_block(mmap.PAGESIZE, [memory])
        if block is None or memory.find(block) is None:
            return None
        del block
        memory.unregister_freed()
        with _lock:
            _servers.add(memory)
        on_leaving(memory.unregister)
        return memory

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate memory that all servers on this host have mapped, or else ordinary memory."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with _lock:
            servers = list(_servers)
        block = shared_block(size, servers)
        return np.empty(shape, dtype) if block is None else block.view(dtype).reshape(shape)

    def place(self, size: int) -> SystemPlace:
        """See `Transport.place`."""
        return SystemPlace(self, size)

    def find(self, array: NDArray[Any]) -> tuple[str, int] | None:
        """Region and offset of a C-contiguous array, if it lies in a block of this server's."""
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        region = self._regions.get(root.ctypes.data)
        return None if region is None else (region, array.ctypes.data - root.ctypes.data)

    def register(self, name: str, block: NDArray[np.uint8]) -> None:
        """Have the server map a block; one that cannot is told the images instead."""
        from tritonclient.utils import InferenceServerException

        self.unregister_freed()
        try:
            self._client.register_system_shared_memory(
                name, f"/{name}", block.nbytes, client_timeout=CALL_SECONDS
            )
        except InferenceServerException as error:
            _LOG.info("no shared memory with this server: %s", error)
            return
        address = block.ctypes.data
        self._regions[address] = name
        # only noted: the garbage collector may run in a thread of gRPC, which must not wait
        weakref.finalize(block, self._free, address).atexit = False

    def unregister(self) -> None:
        """Have the server unmap all blocks."""
        for address in list(self._regions):
            self._free(address)
        self.unregister_freed()

    def _free(self, address: int) -> None:
        region = self._regions.pop(address, None)
        if region is not None:
            self._freed.append(region)

    def unregister_freed(self) -> None:
        """Have the server unmap what this process has freed."""
        from tritonclient.utils import InferenceServerException

        while True:
            try:
                name = self._freed.pop()
            except IndexError:  # not asked before: sessions come here side by side
                return
            with contextlib.suppress(InferenceServerException):  # a server that is gone
                self._client.unregister_system_shared_memory(name, client_timeout=_PARTING_SECONDS)


class SystemPlace:
    """Images in system shared memory: where they are, or copied together; a `Place`."""

    def __init__(self, memory: SystemMemory, size: int) -> None:
        self._memory = memory
        self._size = size
        self._block: NDArray[np.uint8] | None = None
        self._tried = False  # for want of memory, once is enough

    def put(self, images: Sequence[NDArray[Any]]) -> tuple[str, int] | None:
        """See `Place.put`; one run in `SystemMemory.host_array` is not copied."""
        if len(images) == 1 and (found := self._memory.find(images[0])) is not None:
            return found
        if not self._tried:
            self._tried = True
            self._block = shared_block(self._size, [self._memory])
        if self._block is None or (found := self._memory.find(self._block)) is None:
            return None
        start = 0
        for run in images:
            self._block[start : start + run.nbytes] = run.reshape(-1).view(np.uint8)
            start += run.nbytes
        return found

    def close(self) -> None:
        """Let go of the copy."""
        self._block = None
        self._memory.unregister_freed()


def shared_block(size: int, servers: Iterable[SystemMemory]) -> NDArray[np.uint8] | None:
    """Allocate shared memory and have servers map it; None when there is not enough.

    It is freed when no array refers to it any more.
    """
    try:
        with _shared_file(max(1, size)) as (name, file):
            block = np.frombuffer(mmap.mmap(file, max(1, size)), np.uint8)
            with _lock:
                for server in servers:
                    server.register(name, block)
    except OSError as error:
        _LOG.warning(
            "%d MiB of shared memory cannot be had in %s (%s): images are sent instead",
            size >> 20,
            _FOLDER,
            error.strerror,
        )
        return None
    return block


@contextlib.contextmanager
def _shared_file(size: int) -> Iterator[tuple[str, int]]:
    """File in shared memory that has a name only within the context."""
    name = f"ssd-resnet34-{uuid.uuid4().hex}"
    path = _FOLDER / name
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(file, 0, size)  # else the first touch of a missing page kills
        yield name, file
    finally:
        os.close(file)
        path.unlink()

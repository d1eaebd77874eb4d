"""The network of a detector on a GPU, and what it activates in page-locked memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from engine.backends.cuda import Stream, gpu_index, pinned, use_gpu
from engine.backends.onnxruntime.session import find_provider, open_session
from engine.errors import EngineError, one_line
from graph_surgery.protobuf import serialized

_FLOAT32_ALONE = {"use_tf32": "0"}  # TF32 would move the scales by more than a bin

_Memory: TypeAlias = dict[tuple[str, tuple[int, ...]], NDArray[Any]]
"""Arrays by the name and the shape of what they are for."""


class GpuNetwork:
    """A model in ONNX Runtime's CUDA provider, which keeps its float32 outputs on the GPU.

    They come to the host in memory that is allocated once for each batch that is looked at: a
    pageable copy takes several times as long as the network.

    Parameters
    ----------
    model
        What to run.
    names
        The outputs to return.
    path
        The file that it comes from, for messages.
    device
        ``cuda`` or ``cuda:N``.
    at_once
        Batches that are looked at side by side.

    Raises
    ------
    EngineError
        When there is no such GPU, or no ONNX Runtime for it.
    """

    def __init__(
        self, model: onnx.ModelProto, names: Sequence[str], path: Path, device: str, at_once: int
    ) -> None:
        provider = find_provider(path, device)
        self._names, self._index = list(names), gpu_index(device) or 0
        use_gpu(self._index)
        options = {**_FLOAT32_ALONE, "device_id": str(self._index)}
        with serialized(model) as (content, entries):
            self._session = open_session(content, path, provider, options, None, entries=entries)
        self._stream, self._running = Stream(), Lock()
        weakref.finalize(self, self._stream.close)
        self._free: SimpleQueue[_Memory] = SimpleQueue()
        for _ in range(at_once):
            self._free.put({})

    @contextmanager
    def run(
        self, image: str, batch: NDArray[np.float32], where: str
    ) -> Iterator[list[NDArray[np.float32]]]:
        """Run on a batch; the outputs are the caller's until the context ends.

        Parameters
        ----------
        image
            Name of the input.
        batch
            What it takes.
        where
            The first image of the batch, for a message.

        Raises
        ------
        EngineError
            When ONNX Runtime fails.
        """
        memory = self._free.get()
        try:
            with self._running:
                found = self._take(memory, image, batch, where)
            yield found
        finally:
            self._free.put(memory)

    def _take(
        self,
        memory: _Memory,
        image: str,
        batch: NDArray[np.float32],
        where: str,
    ) -> list[NDArray[np.float32]]:
        self._stream.use_gpu()  # the current device is a matter of each thread
        binding = self._session.io_binding()
        binding.bind_cpu_input(image, batch)
        for name in self._names:
            binding.bind_output(name, "cuda", self._index)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ORT's exceptions share no base class but Exception
            raise EngineError(f"ONNX Runtime failed on {where}: {one_line(error)}") from error
        found = []
        for name, value in zip(self._names, binding.get_outputs(), strict=True):
            shape = tuple(value.shape())
            array = memory.get((name, shape))
            if array is None:
                array = memory[name, shape] = pinned(shape, np.float32)
            self._stream.download(array, value.data_ptr())
            found.append(array)
        self._stream.synchronize()
        return found

"""The query sample library: preprocessed images in memory while LoadGen asks for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import SessionLostError
from engine.protocol import Engine
from harness.errors import HarnessError


class SampleSource(Protocol):
    """Preprocessed images in QSL order."""

    @property
    def files(self) -> Sequence[str]:
        """Image file names; the position is the QSL index."""
        ...

    def read_into(self, batch: NDArray[np.generic], indices: Sequence[int]) -> None:
        """Read the images of these QSL indices into `batch`, [len(indices), C, H, W]."""
        ...


class SampleLibrary:
    """Samples that LoadGen has loaded, in one contiguous array of the engine's host memory.

    The memory is kept from one load to the next, because allocating pinned memory takes long.

    Parameters
    ----------
    source
        Where the samples come from.
    engines
        The first that is not lost allocates the memory.
    """

    def __init__(self, source: SampleSource, engines: Sequence[Engine]) -> None:
        self._source = source
        self._engines = engines
        self._spec = spec = engines[0].input_spec
        self._memory: NDArray[np.generic] = np.empty((0, *spec.shape), spec.dtype)
        self._loaded: list[int] = []
        self._row: dict[int, int] = {}

    def load(self, indices: Sequence[int]) -> None:
        """Load samples, in this order; LoadGen repeats the first ones at the end in MultiStream.

        Raises
        ------
        HarnessError
            When there is no memory for them.
        """
        self.unload(())
        count, spec = len(indices), self._spec
        if count > len(self._memory):
            self._memory = np.empty((0, *spec.shape), spec.dtype)  # frees the old memory first
            try:
                self._memory = self._allocate((count, *spec.shape))
            except MemoryError as error:
                size = count * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize / 1e9
                raise HarnessError(
                    f"{count} samples of {size:.1f} GB do not fit in memory; choose a smaller "
                    "--batch or --samples"
                ) from error
        self._source.read_into(self._memory[:count], indices)
        self._loaded = list(indices)
        # reversed: of a repeated sample the first row counts
        self._row = dict(zip(reversed(indices), reversed(range(count)), strict=True))

    def _allocate(self, shape: tuple[int, ...]) -> NDArray[np.generic]:
        *others, last = self._engines
        for engine in others:
            with suppress(SessionLostError):
                return engine.host_array(shape, self._spec.dtype)
        return last.host_array(shape, self._spec.dtype)

    def close(self) -> None:
        """Free the memory: when a run is over, not when the garbage collector comes by."""
        self.unload(())
        self._memory = self._memory[:0].copy()

    def unload(self, indices: Sequence[int]) -> None:
        """Forget the samples; LoadGen unloads exactly what it loaded last."""
        del indices
        self._loaded, self._row = [], {}

    def runs(self, indices: Sequence[int]) -> list[NDArray[np.generic]]:
        """Images of loaded samples, without a copy.

        Parameters
        ----------
        indices
            QSL indices.

        Returns
        -------
        list of ndarray
            Views [n, C, H, W], one for each longest run of samples that lie one after the other;
            together they are the images in the order of `indices`.

        Raises
        ------
        LookupError
            When a sample is not loaded.
        """
        loaded, total = self._loaded, len(indices)
        views = []
        at = 0
        while at < total:
            start = row = self._row[indices[at]]
            while at < total and row < len(loaded) and loaded[row] == indices[at]:
                at += 1
                row += 1
            views.append(self._memory[start:row])
        return views

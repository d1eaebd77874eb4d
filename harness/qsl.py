"""The query sample library: preprocessed images in memory while LoadGen asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SampleSource(Protocol):
    """Preprocessed images in QSL order."""

    @property
    def files(self) -> Sequence[str]:
        """Image file names; the position is the QSL index."""
        ...

    def load(self, indices: Sequence[int]) -> NDArray[np.generic]:
        """Images of these QSL indices, [len(indices), C, H, W], C-contiguous."""
        ...


class SampleLibrary:
    """Samples that LoadGen has loaded, in one contiguous array.

    Parameters
    ----------
    source
        Where the samples come from.
    """

    def __init__(self, source: SampleSource) -> None:
        self._source = source
        self._row = np.zeros(len(source.files), np.int64)
        self._loaded = np.empty(0, np.int64)
        self._images: NDArray[np.generic] | None = None

    def load(self, indices: Sequence[int]) -> None:
        """Load samples, in this order; LoadGen repeats the first ones at the end in MultiStream."""
        self._images = self._source.load(indices)
        self._loaded = np.array(indices, np.int64)
        # reversed: of a repeated sample the first row counts
        self._row[self._loaded[::-1]] = np.arange(len(indices))[::-1]

    def unload(self, indices: Sequence[int]) -> None:
        """Free the samples; LoadGen unloads exactly what it loaded last."""
        del indices
        self._images = None
        self._loaded = np.empty(0, np.int64)

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.generic]:
        """Images of loaded samples.

        Parameters
        ----------
        indices
            int64 [N], QSL indices.

        Returns
        -------
        ndarray
            [N, C, H, W]; a view when the samples lie one after the other, else a copy.

        Raises
        ------
        LookupError
            When a sample is not loaded.
        """
        images, loaded = self._images, self._loaded
        if images is None:
            raise LookupError("no samples are loaded")
        start = int(self._row[indices[0]])
        if np.array_equal(loaded[start : start + len(indices)], indices):
            return images[start : start + len(indices)]
        rows = self._row[indices]
        if not np.array_equal(loaded[rows], indices):
            raise LookupError("a sample is asked for that is not loaded")
        return images[rows]

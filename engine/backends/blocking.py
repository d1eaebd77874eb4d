"""Sessions of a runtime whose only call takes a batch and blocks until it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.protocol import Session

Detect = Callable[[NDArray[np.generic]], tuple[NDArray[np.float32], NDArray[np.int32]]]
"""Batch [N, *spec.shape] to detections and counts, see `engine.protocol.Session.result`."""


class BlockingSession(Session):
    """A stream of execution that works while its result is waited for.

    Parameters
    ----------
    check
        Raises EngineError for runs of images that the model does not take.
    detect
        Runs the model.
    """

    depth = 1

    def __init__(
        self, check: Callable[[Sequence[NDArray[np.generic]]], object], detect: Detect
    ) -> None:
        self._check = check
        self._detect: Detect | None = detect
        self._batch: Sequence[NDArray[np.generic]] | None = None

    def submit(self, images: Sequence[NDArray[np.generic]]) -> None:
        """Keep a batch for `result`; see `engine.protocol.Session.submit`."""
        if self._batch is not None:
            raise EngineError("the result of the last batch was not taken")
        self._check(images)
        self._batch = images

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Run the model on the batch; see `engine.protocol.Session.result`."""
        if self._batch is None or self._detect is None:
            raise EngineError("no batch was submitted")
        images, self._batch = self._batch, None
        return self._detect(images[0] if len(images) == 1 else np.concatenate(images))

    def close(self) -> None:
        """Let go of the model."""
        self._detect = None

"""Time of every step of a batch by itself."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from engine.backends.cuda import Stream, use_gpu
from engine.backends.cudnn.engine import CudnnEngine
from engine.backends.cudnn.measure import measure
from engine.backends.pipeline import Slot
from engine.protocol import DETECTION_FIELDS


def step_times(engine: CudnnEngine, batch: int) -> list[float]:
    """Milliseconds of every step of a batch of noise, NMS the last.

    Parameters
    ----------
    engine
        The engine.
    batch
        One of the sizes in its `programs`.
    """
    use_gpu(engine.device)
    with closing(Stream()) as stream:
        memory = engine.reserve(stream)
        rows = batch * engine.parts.config.keep_top_k * DETECTION_FIELDS * 4
        image_bytes = batch * int(np.prod(engine.input_spec.shape))
        slot = Slot(stream.device(image_bytes), stream.device(rows), stream.device(4 * batch))
        noise = np.random.default_rng(0).integers(-60, 61, image_bytes, np.int8)
        stream.upload(slot.images, noise)
        runs = engine.bind(batch, memory, slot, stream)
        for run in runs:
            run(stream.handle)
        stream.synchronize()
        return [measure(stream, run) for run in runs]

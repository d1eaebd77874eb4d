"""Sessions of a runtime that only blocks."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest

from engine.backends.blocking import BlockingSession
from engine.errors import EngineError
from engine.protocol import InputSpec, check_batch

SPEC = InputSpec("image", (1, 2, 2), "float32")


def session(seen):
    def detect(images):
        seen.append(images)
        return images.sum(axis=(1, 2, 3))[:, None, None], np.arange(len(images), dtype=np.int32)

    return BlockingSession(partial(check_batch, spec=SPEC), detect)


def batch(count, start=0):
    return np.arange(4 * start, 4 * (start + count), dtype=np.float32).reshape(count, 1, 2, 2)


def test_runs_are_one_batch():
    seen = []
    blocking = session(seen)
    images = batch(5)
    blocking.submit([images[:2], images[2:3], images[3:]])
    assert not seen
    detections, counts = blocking.result()
    np.testing.assert_array_equal(seen[0], images)
    np.testing.assert_array_equal(detections[:, 0, 0], images.reshape(5, 4).sum(axis=1))
    assert counts.tolist() == [0, 1, 2, 3, 4]


def test_one_run_is_not_copied():
    seen = []
    blocking = session(seen)
    images = batch(3)
    blocking.submit([images])
    blocking.result()
    assert seen[0] is images


def test_one_thread_may_submit_and_another_wait():
    seen, results = [], []
    blocking = session(seen)
    for start in range(3):
        blocking.submit([batch(1, start)])
        thread = threading.Thread(target=lambda: results.append(blocking.result()))
        thread.start()
        thread.join()
    assert [float(rows[0, 0, 0]) for rows, _ in results] == [6.0, 22.0, 38.0]


def test_misuse_is_refused():
    blocking = session([])
    with pytest.raises(EngineError, match="no batch was submitted"):
        blocking.result()
    for runs in ([], [batch(0)], [batch(1), batch(1).astype(np.float64)], [batch(1)[0]]):
        with pytest.raises(EngineError, match="images"):
            blocking.submit(runs)
    blocking.submit([batch(1)])
    with pytest.raises(EngineError, match="was not taken"):
        blocking.submit([batch(1)])
    blocking.result()
    blocking.close()
    with pytest.raises(EngineError):
        blocking.infer(batch(1))

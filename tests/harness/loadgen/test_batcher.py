"""The queue between LoadGen and the sessions."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.loadgen.batcher import Batch, Batcher

LONG = 600.0


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 8))
def test_without_waiting_all_that_is_there_goes_in_order(queries, size):
    batcher = Batcher(size, 0.0)
    total = 0
    for count in queries:
        batcher.put(range(total, total + count), range(1000 + total, 1000 + total + count))
        total += count
    taken = [batcher.take() for _ in range(-(-total // size))]
    assert [sample for batch in taken for sample in batch.ids] == list(range(total))
    assert all(i - s == 1000 for b in taken for s, i in zip(b.ids, b.indices, strict=True))
    assert {len(batch.ids) for batch in taken[:-1]} <= {size}


def taking(batcher):
    """Take one batch in a thread, which notes it."""
    taken = []
    thread = threading.Thread(target=lambda: taken.append(batcher.take()), daemon=True)
    thread.start()
    return thread, taken


def test_a_batch_that_is_not_full_waits_until_it_is():
    batcher = Batcher(3, LONG)
    thread, taken = taking(batcher)
    for number in range(3):
        thread.join(0.05)
        assert not taken
        batcher.put([number], [number])
    thread.join(30)
    assert taken[0].ids == (0, 1, 2)


def test_the_first_samples_wait_is_what_counts():
    """It waited while nobody could take it, so it does not wait again."""
    batcher = Batcher(3, 0.3)
    batcher.put([0], [0])
    time.sleep(0.31)
    batcher.put([1], [1])
    begin = time.monotonic()
    assert batcher.take().ids == (0, 1)
    assert time.monotonic() - begin < 0.25
    batcher.put([2], [2])
    arrival = time.monotonic()
    assert batcher.take().ids == (2,)
    assert time.monotonic() - arrival > 0.25


@pytest.mark.parametrize("wait", [0.0, LONG])
def test_a_batch_put_back_comes_first(wait):
    batcher = Batcher(2, wait)
    batcher.put(range(6), range(6))
    first, second = batcher.take(), batcher.take()
    batcher.put_back(second)
    batcher.put_back(first)
    assert [batcher.take() for _ in range(3)][:2] == [first, second]


@pytest.mark.parametrize("wait", [0.0, 0.001, LONG])
def test_takers_share_without_loss_or_repetition(wait):
    """Many takers and bursts of samples: everyone wakes up who is needed."""
    batcher = Batcher(4, wait)
    taken, lock = [], threading.Lock()

    def take():
        while (batch := batcher.take()) is not None:
            with lock:
                taken.extend(batch.ids)

    takers = [threading.Thread(target=take, daemon=True) for _ in range(5)]
    for thread in takers:
        thread.start()
    total = 0
    for burst in [1, 3, 4, 40, 1, 1, 2, 100, 8, 16] * 20:
        batcher.put(range(total, total + burst), range(total, total + burst))
        total += burst
    deadline = time.monotonic() + 30
    while len(taken) < total:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    batcher.close()
    for thread in takers:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(taken) == list(range(total))


def test_when_closed_everyone_goes_and_nothing_is_kept():
    batcher = Batcher(2, LONG)
    waiting = [taking(batcher) for _ in range(3)]
    batcher.put([0], [0])
    batcher.close()
    batcher.put([1], [1])
    batcher.put_back(Batch((2,), (2,), (0.0,)))
    for thread, taken in waiting:
        thread.join(30)
        assert taken == [None]
    assert batcher.take() is None

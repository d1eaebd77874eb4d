"""How kernels are measured, with a clock and a stream that are made up."""

from itertools import count

import numpy as np
import pytest

from engine.backends.cudnn import measure as cudnn_measure
from engine.backends.cudnn.measure import _block, _random, measure
from tests.support.host_stream import HostStream, array_at


class Clocked(HostStream):
    """Replays take as long as `times` says, one after the other."""

    def __init__(self, times):
        super().__init__()
        self.times, self.now = iter(times), 0.0

    def event(self, *, timing):
        assert timing
        return Moment()

    def record(self, event):
        event.at = self.now

    def capture(self, work):
        def replay():
            self.now += next(self.times)

        work()
        return replay


class Moment:
    at = 0.0

    def synchronize(self):
        pass

    def elapsed_ms(self, start):
        return self.at - start.at


@pytest.fixture
def ticks(monkeypatch):
    """Every look at the clock is a second later."""
    seconds = count()
    monkeypatch.setattr(cudnn_measure.time, "monotonic", lambda: float(next(seconds)))


def test_the_fastest_round_counts(ticks):
    runs = []
    stream = Clocked([9.0, 1.0, 6.0, 4.0, 5.0])  # the first launch of a CUDA graph takes longer
    assert measure(stream, runs.append) == 2.0  # a round of 2 ms has two runs of 1 ms
    assert len(runs) == 1 + 1 + 2


def test_a_burst_is_not_what_is_measured_after_settling(ticks):
    stream = Clocked([1.0, 1.0, 2.0, 2.0, 6.0, 8.0, 6.0])
    assert measure(stream, lambda _: None, settle_s=3.0) == 3.0


def test_what_is_hopeless_is_not_repeated(ticks):
    assert measure(Clocked([9.5, 9.0]), lambda _: None, 4.0, settle_s=3.0) == 9.0


def test_the_launch_of_a_short_kernel_hardly_counts(ticks):
    """With its launch, a run of 4 us takes 60, more than twice of what another takes without."""
    fastest = 0.009
    stream = Clocked([0.3, 0.06, *[0.056 + 20 * 0.004] * 3])
    assert measure(stream, lambda _: None, fastest) < fastest


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_random_data(monkeypatch, half, relu):
    monkeypatch.setattr(cudnn_measure, "_BLOCK", 1000)
    _block.cache_clear()
    stream, size = HostStream(), 2222 << half
    values = array_at(
        _random(stream, size, half=half, relu=relu), (2222,), np.float16 if half else np.int8
    )
    _block.cache_clear()
    assert (values.min() >= 0) == relu
    assert 20 < values.max() <= 127
    assert len(np.unique(values)) > 20
    np.testing.assert_array_equal(values, np.rint(values))
    np.testing.assert_array_equal(values[:1000], values[1000:2000])
    stream.close()

"""What latencies.json says of a run."""

import numpy as np
import pytest

from harness.results.latencies import read_latencies, summarized
from harness.results.run import run
from tests.support.harness_fakes import FakeEngine, benchmark, short


def test_summary(tmp_path):
    """Counted by hand: ten a second for 100 s, which take 5 ms, but 50 ms in the 40th second."""
    done = np.arange(1, 1001) / 10
    took = np.where((done > 40) & (done <= 41), 0.05, 0.005)
    order = np.random.default_rng(1).permutation(1000)  # threads end in any order
    found = summarized(np.stack([done, took], axis=1)[order])
    assert sum(found.counts) == 1000
    assert sorted(found.counts)[-2:] == [10, 990]
    low, high = (
        (found.edges_ms[i], found.edges_ms[i + 1]) for i, n in enumerate(found.counts) if n
    )
    assert low[0] <= 5 <= low[1] and high[0] <= 50 <= high[1]
    slow = [end for end, p50 in zip(found.seconds, found.p50_ms, strict=True) if p50 == 50]
    assert slow == [40.5, 41.0]
    found.write(tmp_path)
    assert read_latencies(tmp_path) == found


@pytest.mark.parametrize("times", [[], [(0.0, 0.0)], [(1.0, 0.002)], [(1.0, 0.002)] * 3])
def test_few_latencies(times):
    found = summarized(np.array(times, float).reshape(-1, 2))
    assert sum(found.counts) == len(times)
    assert set(found.max_ms) == {1000 * took for _, took in times}
    assert all(a < b for a, b in zip(found.edges_ms, found.edges_ms[1:], strict=False))


@pytest.mark.parametrize("scenario", ["Offline", "Server", "SingleStream", "MultiStream"])
def test_a_run_leaves_its_latencies(scenario, tmp_path):
    """They are those that LoadGen measures, but in Offline, where it has only the whole run's."""
    settings = short(scenario, min_duration_ms=300)
    result = run(benchmark(FakeEngine(seconds=0.003)), settings, "PerformanceOnly", tmp_path / "a")
    found = read_latencies(tmp_path / "a")
    theirs = result.batch_latency_ms if scenario == "Offline" else result.latency_ms
    middle = np.searchsorted(np.cumsum(found.counts), sum(found.counts) / 2)
    # an engine takes 3 ms at least; LoadGen's begin earlier: in Server when a query was due
    assert 3 <= found.edges_ms[0] <= 1.1 * theirs["min"] + 0.3
    assert 3 <= found.edges_ms[middle + 1] <= 1.2 * theirs["p50"] + 0.5
    assert max(found.max_ms) == pytest.approx(found.edges_ms[-1], rel=1e-3)
    assert 0.2 < found.seconds[-1] < 60
    run(benchmark(FakeEngine()), settings, "AccuracyOnly", tmp_path / "b")
    assert read_latencies(tmp_path / "b") is None

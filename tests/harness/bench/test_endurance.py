"""The bench of memory in long runs."""

from __future__ import annotations

import numpy as np
import pytest

from harness.bench.drawn import measure as measure_drawn
from harness.bench.endurance import growth, measure


def test_growth_is_that_between_start_and_logs() -> None:
    times = np.arange(0, 700, 0.5)
    resident = 50 + 0.3 * times / 60
    resident[times <= 60] = times[times <= 60]  # starting
    resident[times >= 600] += 500  # LoadGen writes its logs
    assert growth(times, resident, 600) == pytest.approx(0.3)


def test_runs_are_measured_beside_their_peers() -> None:
    found = measure({"SingleStream": 0.05, "Offline": 0.05})
    for run in found.values():
        for one in (run["harness"], run["bare"]):
            assert one["queries"] > 0
            assert 1 < min(one["rss_mib"]) <= max(one["rss_mib"]) <= one["peak_rss_mib"]
        ours, bare = (run[name]["growth_mib_per_minute"] for name in ("harness", "bare"))
        assert run["growth_less_loadgen_mib_per_minute"] == ours - bare
    # both wait for 20 ms a query
    harness, bare = (found["SingleStream"][name]["queries"] for name in ("harness", "bare"))
    assert 0 < harness <= 151
    assert 0 < bare <= 151


def test_queries_that_loadgen_draws_take_memory() -> None:
    """Some 200,000 of them, each of which has an id, an index and times at least."""
    found = measure_drawn("SingleStream")
    assert found["peak_mib"][0] + 10 < found["peak_mib"][1]
    assert 50 < found["bytes_per_query"] < 5000

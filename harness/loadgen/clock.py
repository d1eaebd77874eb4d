"""LoadGen's time against the monotonic clock.

LoadGen measures by the wall clock (``std::chrono::high_resolution_clock``, which is the system's in
libstdc++), so whoever sets the clock during a run changes its result, or lets it wait for hours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from harness.errors import RunFailedError

CLOCK_WAS_SET = (
    "the wall clock, by which LoadGen measures, was set during the run; run it again when nothing "
    "sets it"
)
_SLACK_S = 0.05
_SHARE = 0.005  # a clock that is slewed, not set, is off by 0.0005


class WallClock:
    """The wall clock, watched from now on."""

    def __init__(self) -> None:
        self._wall, self._begin = time.time(), time.monotonic()

    def step(self) -> float:
        """Seconds by which it was set forward since then; 0 for what does not matter."""
        passed = time.monotonic() - self._begin
        wall = time.time() - self._wall
        return wall - passed if _differ(wall, passed) else 0.0


def check_times(scenario: str, values: Mapping[str, Any], issuing_s: float, span_s: float) -> None:
    """Hold the times of a performance run's detail log against ours.

    Parameters
    ----------
    scenario
        LoadGen's name.
    values
        The detail log's.
    issuing_s, span_s
        Seconds from the first query to the last one, and to the last completion.

    Raises
    ------
    RunFailedError
        A latency is negative, or LoadGen's duration is another by 0.5 % and 50 ms.
    """
    lowest = min(value for key, value in values.items() if key.endswith("_latency_ns"))
    if lowest < 0:
        raise RunFailedError(f"LoadGen measured a latency of {lowest / 1e6:g} ms: {CLOCK_WAS_SET}")
    queries = values["result_query_count"]
    # as LoadGen 6 computes these figures (loadgen/results.cc)
    if scenario == "Offline":
        found, ours = values["result_max_latency_ns"] / 1e9, span_s
    elif scenario == "Server":
        found, ours = (queries - 1) / values["result_completed_samples_per_sec"], span_s
    elif scenario == "SingleStream":
        found, ours = (queries - 1) / values["result_qps_with_loadgen_overhead"], issuing_s
    else:  # nothing but latencies, and between two of them LoadGen takes time, too
        found = queries * values["result_mean_query_latency_ns"] / 1e9
        ours = min(found, span_s)
    if _differ(found, ours):
        raise RunFailedError(
            f"LoadGen measured {found:.3f} s for what took {ours:.3f} s: {CLOCK_WAS_SET}"
        )


def _differ(found: float, ours: float) -> bool:
    return abs(found - ours) > max(_SLACK_S, _SHARE * ours)

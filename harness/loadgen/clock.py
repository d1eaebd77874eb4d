"""LoadGen's time against the monotonic clock.

LoadGen measures by the wall clock (``std::chrono::high_resolution_clock``, which is the system's in
libstdc++), so whoever sets the clock during a run changes its result, or lets it wait for hours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
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
        self._begin, self._offset = time.monotonic(), _offset()

    def step(self) -> float:
        """Seconds by which it was set forward since then; 0 for what does not matter."""
        step = _offset() - self._offset
        return step if abs(step) > _tolerance(time.monotonic() - self._begin) else 0.0


def _offset() -> float:
    """Wall clock less monotonic clock, read where nothing came between the two."""
    tries = [(time.monotonic(), time.time(), time.monotonic()) for _ in range(5)]
    before, wall, after = min(tries, key=lambda one: one[2] - one[0])
    return wall - (before + after) / 2


@dataclass
class Times:
    """When what happened in a test, by the monotonic clock, in seconds.

    LoadGen takes its own times a little before a query arrives here, after samples were `loaded`,
    and while a completion is handed over; how long that takes is up to who else wants to run.

    Attributes
    ----------
    loaded
        The samples were loaded.
    first_query, last_query
        Arrival.
    before_last
        The last completion before `last_query`.
    last_completion, handed_over
        Begin and end of the call that told LoadGen of the last completion.
    """

    loaded: float = 0.0
    first_query: float = 0.0
    last_query: float = 0.0
    before_last: float = 0.0
    last_completion: float = 0.0
    handed_over: float = 0.0


def check_times(scenario: str, values: Mapping[str, Any], times: Times) -> None:
    """Hold the times of a performance run's detail log against ours.

    Parameters
    ----------
    scenario
        LoadGen's name.
    values
        The detail log's.
    times
        Ours.

    Raises
    ------
    RunFailedError
        A latency is negative, or LoadGen's duration is another by 0.5 % and 50 ms.
    """
    lowest = min(value for key, value in values.items() if key.endswith("_latency_ns"))
    if lowest < 0:
        raise RunFailedError(f"LoadGen measured a latency of {lowest / 1e6:g} ms: {CLOCK_WAS_SET}")
    queries = values["result_query_count"]
    least = times.last_completion - times.first_query
    most = times.handed_over - times.loaded
    # as LoadGen 6 computes these figures (loadgen/results.cc)
    if scenario == "Offline":
        found = values["result_max_latency_ns"] / 1e9
    elif scenario == "Server":
        found = (queries - 1) / values["result_completed_samples_per_sec"]
        # until the last query issued was answered; an earlier one may take longer
        least = times.last_query - times.first_query
    elif scenario == "SingleStream":  # until the last query
        found = (queries - 1) / values["result_qps_with_loadgen_overhead"]
        least, most = times.before_last - times.first_query, times.last_query - times.loaded
    else:  # nothing but latencies, and between two of them LoadGen takes time, too
        found = queries * values["result_mean_query_latency_ns"] / 1e9
        least = 0.0
    ours = min(max(found, least), most)
    if abs(found - ours) > _tolerance(ours):
        raise RunFailedError(
            f"LoadGen measured {found:.3f} s for what took {ours:.3f} s: {CLOCK_WAS_SET}"
        )


def _tolerance(seconds: float) -> float:
    return max(_SLACK_S, _SHARE * seconds)

"""latencies.json: a performance run's latencies, their distribution and their course over time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.support.documents import read_as
from engine.support.files import write_atomically
from harness.errors import as_harness_error

LATENCIES = "latencies.json"

_BINS = 100
_SPANS = 200  # of time: as many points as a chart can show


@dataclass(frozen=True)
class Latencies:
    """Summary of latencies, of batches in Offline, else of samples.

    Attributes
    ----------
    edges_ms
        Edges of the bins of the histogram, one more than there are bins; milliseconds.
    counts
        Latencies in each bin.
    seconds
        Ends of the spans of time in which something was done, from the first query on.
    p50_ms, p99_ms, max_ms
        Of the latencies of what was done in each span.
    """

    edges_ms: tuple[float, ...]
    counts: tuple[int, ...]
    seconds: tuple[float, ...]
    p50_ms: tuple[float, ...]
    p99_ms: tuple[float, ...]
    max_ms: tuple[float, ...]

    def write(self, directory: Path) -> None:
        """Write the file into the folder of a run."""
        write_atomically(directory / LATENCIES, (json.dumps(asdict(self)) + "\n").encode())


def read_latencies(directory: Path) -> Latencies | None:
    """Read the file in the folder of a run; None where there is none, as in accuracy runs.

    Raises
    ------
    HarnessError
        When it cannot be read or is none of ours.
    """
    path = directory / LATENCIES
    if not path.exists():
        return None
    with as_harness_error():
        return read_as(Latencies, path, "it is not a file of 'harness run'")


def summarized(latencies: NDArray[np.float64]) -> Latencies:
    """Summarise latencies.

    Parameters
    ----------
    latencies
        float64 [N, 2]: when something was done, and how long it took; seconds.
    """
    ordered = latencies[np.argsort(latencies[:, 0], kind="stable")]
    ms = ordered[:, 1] * 1000
    low, high = (max(ms.min(), 1e-3), ms.max()) if len(ms) else (1.0, 1.0)
    # by ratio, so that one slow start does not press all else into one bin
    edges = np.geomspace(low, max(high, 1.001 * low), _BINS + 1)
    if len(ms):  # which rounding may have moved
        edges[0], edges[-1] = min(edges[0], ms.min()), max(edges[-1], high)
    ends = np.linspace(0, ordered[-1, 0] if len(ms) else 0.0, _SPANS + 1)[1:]
    cuts = np.searchsorted(ordered[:, 0], ends, side="right")
    spans = [
        (end, span)
        for end, span in zip(ends.tolist(), np.split(ms, cuts[:-1]), strict=True)
        if len(span)
    ]
    p50, p99, largest = (
        np.array(
            # the inverted CDF is what LoadGen reports: a value that occurred
            [np.percentile(span, (50, 99, 100), method="inverted_cdf") for _, span in spans]
        )
        .reshape(-1, 3)
        .T.round(6)
        .tolist()
    )
    return Latencies(
        tuple(edges.tolist()),
        tuple(np.histogram(ms, edges)[0].tolist()),
        tuple(round(end, 3) for end, _ in spans),
        tuple(p50),
        tuple(p99),
        tuple(largest),
    )

"""What still counts as the same detector."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """What still counts as the same detector.

    Attributes
    ----------
    snr
        Least signal-to-noise ratio of a head tensor, median over the images, in dB.
    matched
        Least share of detections that have a partner: 2 * matched / all of both sides.
    score
        Largest difference in score of a matched pair.
    precision
        Least mAP of the second side, as a share of the first side's.
    """

    snr: float
    matched: float
    score: float
    precision: float


SAME_INT8_TOLERANCE = Tolerance(snr=20.0, matched=0.8, score=0.3, precision=0.99)
"""One INT8 graph, computed as it is written and by an engine that rounds in its own way."""

FLOAT_TOLERANCE = Tolerance(snr=60.0, matched=0.99, score=0.01, precision=0.999)
"""Float32 in another order of summation, or by another library."""

INT8_TOLERANCE = Tolerance(snr=15.0, matched=0.8, score=0.3, precision=0.99)
"""INT8 against float. 99 % of the mAP is MLPerf's rule. The others leave room below what a good
calibration of the demo model reaches, and catch a wrong scale, layout or weight."""


@dataclass(frozen=True)
class Check:
    """A figure and its bound.

    Attributes
    ----------
    what
        The figure.
    value, bound
        It, and what it is held against.
    at_least
        Whether the bound is a lower one.
    """

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether the figure keeps the bound; NaN does not."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

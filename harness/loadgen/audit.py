"""What the compliance tests of MLPerf Inference v2.0 change in a performance run.

The values are those of the audit.config files for ssd-resnet34 in MLPerf Inference v2.0,
compliance/nvidia/TEST01, TEST04-A, TEST04-B and TEST05.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Audit:
    """One audited run.

    Attributes
    ----------
    name
        As in the submission tree: ``TEST04-A``.
    config
        Text of LoadGen's audit.config.
    other_seeds
        Whether LoadGen shall use its embedded TEST05 seeds. LoadGen 6 does not take seeds from an
        audit.config any more.
    """

    name: str
    config: str
    other_seeds: bool = False


_PERFORMANCE = "*.*.mode = 2\n"

SAMPLING_TARGET = 256
"""Answers that TEST01 wants logged; LoadGen logs each with probability target / expected number."""

COMPLIANCE_TESTS: Mapping[str, tuple[Audit, ...]] = {
    "TEST01": (
        Audit(
            "TEST01",
            f"{_PERFORMANCE}*.*.accuracy_log_rng_seed = 720381539243781796\n"
            f"*.*.accuracy_log_sampling_target = {SAMPLING_TARGET}\n",
        ),
    ),
    "TEST04": (
        Audit("TEST04-A", f"{_PERFORMANCE}*.*.performance_issue_unique = 1\n"),
        Audit(
            "TEST04-B",
            f"{_PERFORMANCE}*.*.performance_issue_same = 1\n*.*.performance_issue_same_index = 3\n",
        ),
    ),
    "TEST05": (Audit("TEST05", _PERFORMANCE, other_seeds=True),),
}
"""Compliance test to its runs, in order."""

"""RUN_ARGS of the make targets, under the names that NVIDIA's submissions gave them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from harness.benchmarks import BENCHMARKS
from harness.errors import HarnessError
from harness.loadgen.settings import MODES, SCENARIOS, Mode
from harness.make.system_config import VERSIONS
from harness.results.devices import parse_devices, parse_urls

_Name = TypeVar("_Name", bound=str)

FAST = {"min_duration_ms": 60_000, "min_query_count": 1}
"""Settings of ``--fast``, as in NVIDIA's submissions: a trial that no submission may use."""


@dataclass(frozen=True)
class RunArgs:
    """What to do.

    Attributes
    ----------
    benchmarks, scenarios, modes
        Every combination is run.
    version
        Table of the system configuration.
    system
        Name of the system configuration; None: this machine's.
    fast
        Run with `FAST`.
    devices, urls, streams
        Instead of those of the system configuration, see
        `harness.make.system_config.SystemConfig` and `harness.loadgen.settings.Settings`;
        None: those.
    """

    benchmarks: tuple[str, ...]
    scenarios: tuple[str, ...]
    modes: tuple[Mode, ...]
    version: str
    system: str | None
    fast: bool
    devices: tuple[int, ...] | None
    urls: tuple[str, ...] | None
    streams: int | None


def run_args(
    *,
    benchmarks: str,
    scenarios: str,
    test_mode: str,
    config_ver: str,
    system: str | None,
    fast: bool,
    devices: str | None,
    url: str | None,
    streams: int | None,
) -> RunArgs:
    """Check the arguments.

    Raises
    ------
    HarnessError
        For an unknown name; lists the known ones.
    """
    return RunArgs(
        choices(benchmarks, tuple(BENCHMARKS), "benchmark"),
        choices(scenarios, tuple(SCENARIOS), "scenario"),
        choices(test_mode, MODES, "test mode"),
        choice(config_ver, VERSIONS, "config version"),
        system,
        fast,
        None if devices is None else parse_devices(devices),
        None if url is None else parse_urls(url),
        streams,
    )


def choices(text: str, known: tuple[_Name, ...], what: str) -> tuple[_Name, ...]:
    """Names of a comma-separated list, in any case, each once; ``all`` stands for every one.

    Raises
    ------
    HarnessError
        For an unknown name; lists the known ones.
    """
    if text.strip().lower() == "all":
        return known
    return tuple(dict.fromkeys(choice(word, known, what) for word in text.split(",")))


def choice(word: str, known: tuple[_Name, ...], what: str) -> _Name:
    """One of the known names, in any case; see `choices`."""
    names = {name.lower(): name for name in known}
    if word.strip().lower() not in names:
        raise HarnessError(f"unknown {what} {word!r}; choose of: {', '.join(known)}")
    return names[word.strip().lower()]

"""LoadGen settings of each scenario, and the user.conf that carries them.

LoadGen 6 does not know every detector, so all that the benchmarks fixed is set here: 64 samples in
memory, Server within 100 ms, MultiStream of 8 samples, Offline of 24,576 samples, 600 s, as MLPerf
Inference has them in v2.0 for SSD-ResNet34 and in v5.1 for RetinaNet, on top of LoadGen's own
defaults, which its embedded configuration holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, PositiveInt

from engine.support.documents import checked, read_toml
from engine.support.files import write_atomically
from harness.errors import HarnessError, as_harness_error

Mode = Literal["PerformanceOnly", "AccuracyOnly"]
MODES: tuple[Mode, ...] = get_args(Mode)

DEFAULT_BATCH = 8

_NS_PER_MS = 1_000_000
_LEAST_LATENCY_MS = 0.02
"""Of a query through Python, halved; of less, LoadGen would draw gigabytes of queries."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _loadgen(key: str, attribute: str, scale: int = 1) -> dict[str, Any]:
    """Tie a field to its user.conf key, and to the TestSettings attribute it must end up in."""
    return {"key": key, "attribute": attribute, "scale": scale}


@dataclass(frozen=True)
class Settings:
    """What all scenarios share.

    Attributes
    ----------
    min_duration_ms
        Shortest duration of a performance run, in milliseconds.
    min_query_count
        Fewest queries of a performance run (Offline: samples).
    performance_sample_count
        Samples that are in memory together; a performance run uses only these.
    streams
        Sessions of the engine that work side by side on each device.
    """

    scenario: ClassVar[str]

    min_duration_ms: PositiveInt = field(
        default=600_000, metadata=_loadgen("min_duration", "min_duration_ms")
    )
    min_query_count: PositiveInt = field(
        default=100, metadata=_loadgen("min_query_count", "min_query_count")
    )
    performance_sample_count: PositiveInt = field(
        default=64,
        metadata=_loadgen("performance_sample_count_override", "performance_sample_count_override"),
    )
    streams: PositiveInt = 1

    @property
    def batch(self) -> int:
        """Largest batch that the engine shall get."""
        return 1

    @property
    def max_wait_s(self) -> float:
        """Seconds for which a batch that is not full waits for more samples."""
        return 0.0

    def estimated(self, batch_seconds: float) -> Settings:
        """Fill what is None from the time the engine took for one full batch.

        LoadGen draws the queries before the run, from an expected speed: too low a speed leaves it
        without queries before the minimum duration (the run is INVALID), too high a speed costs
        only memory or a longer Offline run. So the estimates err on the fast side.
        """
        del batch_seconds
        return self


@dataclass(frozen=True)
class SingleStream(Settings):
    """One sample at a time; the next one follows the answer.

    Attributes
    ----------
    target_latency_ms
        Expected latency of a query; None: estimated from the warm-up.
    """

    scenario: ClassVar[str] = "SingleStream"

    target_latency_ms: Positive | None = field(
        default=None,
        metadata=_loadgen("target_latency", "single_stream_expected_latency_ns", _NS_PER_MS),
    )

    def estimated(self, batch_seconds: float) -> SingleStream:
        """See `Settings.estimated`: half the measured latency."""
        latency_ms = self.target_latency_ms or max(500 * batch_seconds, _LEAST_LATENCY_MS)
        return dataclasses.replace(self, target_latency_ms=latency_ms)


@dataclass(frozen=True)
class MultiStream(Settings):
    """A query of several samples at a time; the next one follows the answer.

    Attributes
    ----------
    samples_per_query
        Samples of a query, which are one batch.
    target_latency_ms
        Expected latency of a query; None: estimated from the warm-up.
    """

    scenario: ClassVar[str] = "MultiStream"

    min_query_count: PositiveInt = field(
        default=662, metadata=_loadgen("min_query_count", "min_query_count")
    )
    samples_per_query: PositiveInt = field(
        default=8, metadata=_loadgen("samples_per_query", "multi_stream_samples_per_query")
    )
    target_latency_ms: Positive | None = field(
        default=None,
        metadata=_loadgen("target_latency", "multi_stream_expected_latency_ns", _NS_PER_MS),
    )

    @property
    def batch(self) -> int:
        """The whole query."""
        return self.samples_per_query

    def estimated(self, batch_seconds: float) -> MultiStream:
        """See `Settings.estimated`: half the measured latency."""
        latency_ms = self.target_latency_ms or max(500 * batch_seconds, _LEAST_LATENCY_MS)
        return dataclasses.replace(self, target_latency_ms=latency_ms)


@dataclass(frozen=True)
class Server(Settings):
    """Samples arrive one by one at random times; 99 % must be answered in time.

    Attributes
    ----------
    target_qps
        Arrivals per second; None: half of what the engine reached in the warm-up.
    target_latency_ms
        Time for an answer, whole milliseconds.
    batch_size
        Largest batch; None: the one that the engine was built for, else `DEFAULT_BATCH`.
    batch_delay_ms
        Milliseconds for which a batch that is not full waits for more samples.
    """

    scenario: ClassVar[str] = "Server"

    target_qps: Positive | None = field(
        default=None, metadata=_loadgen("target_qps", "server_target_qps")
    )
    target_latency_ms: PositiveInt = field(
        default=100, metadata=_loadgen("target_latency", "server_target_latency_ns", _NS_PER_MS)
    )
    batch_size: PositiveInt | None = None
    batch_delay_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0

    @property
    def batch(self) -> int:
        """The chosen batch size."""
        return self.batch_size or DEFAULT_BATCH

    @property
    def max_wait_s(self) -> float:
        """The batch delay."""
        return self.batch_delay_ms / 1000

    def estimated(self, batch_seconds: float) -> Server:
        """See `Settings.estimated`: half the measured throughput, which leaves room to queue."""
        if self.target_qps is not None:
            return self
        return dataclasses.replace(self, target_qps=0.5 * self.batch / batch_seconds)


@dataclass(frozen=True)
class Offline(Settings):
    """All samples at once.

    Attributes
    ----------
    target_qps
        Expected samples per second; None: estimated from the warm-up.
    batch_size
        Batch, of which only the last may be smaller; None: the one that the engine was built for,
        else `DEFAULT_BATCH`.
    """

    scenario: ClassVar[str] = "Offline"

    min_query_count: PositiveInt = field(
        default=24_576, metadata=_loadgen("min_query_count", "min_query_count")
    )
    target_qps: Positive | None = field(
        default=None, metadata=_loadgen("target_qps", "offline_expected_qps")
    )
    batch_size: PositiveInt | None = None

    @property
    def batch(self) -> int:
        """The chosen batch size."""
        return self.batch_size or DEFAULT_BATCH

    def estimated(self, batch_seconds: float) -> Offline:
        """See `Settings.estimated`: half more than measured, as a busy machine may get faster."""
        if self.target_qps is not None:
            return self
        return dataclasses.replace(self, target_qps=1.5 * self.batch / batch_seconds)


SCENARIOS: Mapping[str, type[Settings]] = {
    kind.scenario: kind for kind in (Offline, Server, SingleStream, MultiStream)
}


def largest_batch(settings: Iterable[Settings]) -> int:
    """Largest batch of some tests on an engine that was built for none in particular."""
    return max(one.batch for one in settings)


def load_settings(
    scenarios: Sequence[str], config: Path | None, overrides: Mapping[str, object]
) -> tuple[Settings, ...]:
    """Settings of the chosen scenarios: defaults, then the file, then the overrides.

    Parameters
    ----------
    scenarios
        Keys of `SCENARIOS`.
    config
        TOML file or None. Keys are the fields of the classes in this module; on the top level they
        hold for every scenario that has the field, in a table named as a scenario for that one.
    overrides
        Field to value, above the file; a None is no override. Each must be a field of at least one
        chosen scenario, and holds for those that have it.

    Raises
    ------
    HarnessError
        For an unreadable file, an unknown name or a value of the wrong kind.
    """
    tables: dict[str, Any] = {}
    if config is not None:
        with as_harness_error():
            tables = read_toml(config)
        check_tables(tables, f"{config}: ")
    return settings_from(tables, scenarios, overrides)


def settings_from(
    tables: Mapping[str, Any], scenarios: Sequence[str], overrides: Mapping[str, object]
) -> tuple[Settings, ...]:
    """Settings as of `load_settings`, from the content of a file: see `check_tables`."""
    shared = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    given = {key: value for key, value in overrides.items() if value is not None}
    kinds = [SCENARIOS[scenario] for scenario in scenarios]
    for key in given:
        if not any(key in _fields(kind) for kind in kinds):
            raise HarnessError(f"{key} is no setting of {', '.join(scenarios)}")
    result = []
    for kind in kinds:
        merged = {**shared, **tables.get(kind.scenario, {}), **given}
        values = {key: value for key, value in merged.items() if key in _fields(kind)}
        with as_harness_error():
            result.append(checked(kind, values, f"{kind.scenario}."))
    return tuple(result)


def check_tables(tables: Mapping[str, Any], where: str) -> None:
    """Check the content of a settings file, whose messages begin with `where`.

    Raises
    ------
    HarnessError
        For an unknown name, or a wrong value.
    """
    every = {key for kind in SCENARIOS.values() for key in _fields(kind)}
    for key, value in tables.items():
        if isinstance(value, dict) and key in SCENARIOS:
            with as_harness_error():
                checked(SCENARIOS[key], value, f"{where}{key}.")
        elif key not in (known := set(SCENARIOS) if isinstance(value, dict) else every):
            raise HarnessError(f"{where}{key}: unknown; known: {', '.join(sorted(known))}")
        else:
            kind = next(kind for kind in SCENARIOS.values() if key in _fields(kind))
            with as_harness_error():
                checked(kind, {key: value}, where)


def fitted(settings: Settings, max_batch: int | None, best: int | None = None) -> Settings:
    """Settings with a batch size that the engine takes: where none is asked for, its `best`.

    Raises
    ------
    HarnessError
        When a larger one was asked for.
    """
    if not isinstance(settings, Server | Offline):
        return settings
    if settings.batch_size is None:
        batch = best or DEFAULT_BATCH
        return dataclasses.replace(settings, batch_size=min(batch, max_batch or batch))
    if max_batch is not None and settings.batch_size > max_batch:
        raise HarnessError(
            f"{settings.scenario}: batch size {settings.batch_size}, but the engine takes at most "
            f"{max_batch}; choose a smaller one or build the engine for it"
        )
    return settings


def user_conf(settings: Settings, detector: str) -> str:
    """LoadGen's user.conf: one ``model.scenario.key = number`` per line, spaces around ``=``."""
    return "".join(
        # fixed notation, because nothing says that LoadGen reads exponents
        f"{detector}.{settings.scenario}.{entry['key']} = "
        f"{value if isinstance(value, int) else format(value, '.9f')}\n"
        for entry, value in _entries(settings)
    )


def apply(settings: Settings, mode: Mode, conf: Path, detector: str) -> Any:
    """Write `conf`, let LoadGen read it, and see that it took every value.

    Parameters
    ----------
    settings
        Without None (see `Settings.estimated`).
    mode
        The LoadGen test mode.
    conf
        user.conf to write.
    detector
        LoadGen's name of the model.

    Returns
    -------
    mlperf_loadgen.TestSettings
        Ready for a test.

    Raises
    ------
    HarnessError
        When LoadGen refuses the file or ends up with another value.
    """
    import mlperf_loadgen as lg

    write_atomically(conf, user_conf(settings, detector).encode())
    test = lg.TestSettings()
    # Type 0 is LoadGen's embedded mlperf.conf, which brings the seeds; type 2 reads only the file.
    # Type 1 would do both, but only once in a process.
    for path, kind in (("", 0), (str(conf), 2)):
        code = test.FromConfig(path, detector, settings.scenario, kind)
        if code != 0:
            raise HarnessError(f"LoadGen refused {path or 'its own mlperf.conf'} (code {code})")
    test.scenario = getattr(lg.TestScenario, settings.scenario)
    test.mode = getattr(lg.TestMode, mode)
    for entry, value in _entries(settings):
        taken = getattr(test, entry["attribute"])
        wanted = value * entry["scale"]
        if not math.isclose(taken, wanted, rel_tol=1e-5):
            raise HarnessError(
                f"LoadGen took {entry['attribute']} = {taken} instead of {wanted} from {conf}"
            )
    return test


def _entries(settings: Settings) -> list[tuple[Mapping[str, Any], int | float]]:
    return [
        (item.metadata, getattr(settings, item.name))
        for item in dataclasses.fields(settings)
        if item.metadata
    ]


def _fields(kind: type[Settings]) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(kind)}

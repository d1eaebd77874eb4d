"""LoadGen settings: what reaches LoadGen, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import mlperf_loadgen as lg
import pytest
import tomlkit
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.loadgen.settings import (
    MODES,
    SCENARIOS,
    MultiStream,
    Offline,
    Server,
    SingleStream,
    apply,
    fitted,
    load_settings,
    user_conf,
)
from tests.support import attempt
from tests.support.formats import Sample, damages

# MLPerf Inference v2.0 rules for ssd-resnet34, and the seeds of the installed LoadGen
BENCHMARK_RULES = {
    "Offline": {"min_query_count": 24576, "offline_expected_qps": 10.0},
    "Server": {"server_target_latency_ns": 100_000_000, "server_target_qps": 10.0},
    "SingleStream": {"single_stream_expected_latency_ns": 50e6},
    "MultiStream": {
        "multi_stream_samples_per_query": 8,
        "min_query_count": 662,
        "multi_stream_expected_latency_ns": 50e6,
    },
}
TARGETS = {"target_qps": 10.0, "target_latency_ms": 50}


def load(scenario, config=None, **overrides):
    return load_settings([scenario], config, overrides)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("detector", ["ssd-resnet34", "retinanet"])
def test_loadgen_gets_the_benchmark_rules(scenario, mode, detector, tmp_path):
    names = {field.name for field in dataclasses.fields(SCENARIOS[scenario])}
    targets = {key: value for key, value in TARGETS.items() if key in names}
    if scenario == "Server":
        del targets["target_latency_ms"]
    test = apply(load(scenario, **targets), mode, tmp_path / "user.conf", detector)
    embedded = lg.TestSettings()
    assert embedded.FromConfig("", "retinanet", scenario, 0) == 0
    assert test.scenario == getattr(lg.TestScenario, scenario)
    assert test.mode == getattr(lg.TestMode, mode)
    assert test.performance_sample_count_override == 64
    assert test.min_duration_ms == 600_000
    for attribute, value in BENCHMARK_RULES[scenario].items():
        assert getattr(test, attribute) == value
    for seed in ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed"):
        assert getattr(test, seed) == getattr(embedded, seed) != 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_defaults_are_what_loadgen_knows_of_retinanet(scenario, tmp_path):
    """But for what is estimated from a warm-up."""
    known = lg.TestSettings()
    assert known.FromConfig("", "retinanet", scenario, 0) == 0
    made = load(scenario)
    test = apply(made.estimated(0.001), "PerformanceOnly", tmp_path / "user.conf", "retinanet")
    for name in (
        "performance_sample_count_override",
        "min_duration_ms",
        "min_query_count",
        "server_target_latency_ns",
        "multi_stream_samples_per_query",
    ):
        if scenario == "Server" or not name.startswith("server"):
            assert getattr(test, name) == getattr(known, name), name


@settings(max_examples=50)
@given(
    qps=st.floats(1e-2, 1e7),
    latency=st.integers(1, 10**6),
    duration=st.integers(1, 10**7),
    count=st.integers(1, 10**9),
)
def test_every_value_arrives(qps, latency, duration, count, tmp_path_factory):
    conf = tmp_path_factory.mktemp("conf") / "user.conf"
    made = load(
        "Server",
        target_qps=qps,
        target_latency_ms=latency,
        min_duration_ms=duration,
        min_query_count=count,
    )
    test = apply(made, "PerformanceOnly", conf, "retinanet")
    assert test.server_target_qps == pytest.approx(qps, rel=1e-5)
    assert test.server_target_latency_ns == latency * 10**6
    assert test.min_duration_ms == duration
    assert test.min_query_count == count


def test_a_value_that_loadgen_does_not_take_is_an_error(tmp_path, monkeypatch):
    # LoadGen ignores a line without spaces around '=' and says nothing
    monkeypatch.setattr(
        "harness.loadgen.settings.user_conf",
        lambda *given: user_conf(*given).replace(" = ", "="),
    )
    with pytest.raises(HarnessError, match="LoadGen took"):
        apply(load("Offline", target_qps=10.0), "PerformanceOnly", tmp_path / "user.conf", "d")


REFUSED = """
import sys
from pathlib import Path
from harness.loadgen import settings
written = settings.user_conf
settings.user_conf = lambda *given: written(*given)[:-1] + " # comment\\n"
(offline,) = settings.load_settings(["Offline"], None, {"target_qps": 10.0})
settings.apply(offline, "PerformanceOnly", Path(sys.argv[1]), "retinanet")
"""


def test_a_file_that_loadgen_refuses_is_an_error(tmp_path):
    """In a process of its own, for LoadGen's complaint comes into the log of the next run."""
    done = attempt("-c", REFUSED, tmp_path / "user.conf")
    assert re.search(
        r"^harness\.errors\.HarnessError: LoadGen refused .*user\.conf", done.stderr, re.M
    )


def test_file_and_overrides(tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text(
        "min_duration_ms = 5000\ntarget_qps = 7\n[Server]\ntarget_qps = 9.5\nbatch_size = 4\n"
    )
    offline, server, single = load_settings(
        ["Offline", "Server", "SingleStream"], config, {"min_query_count": 3, "batch_size": None}
    )
    assert offline == Offline(min_duration_ms=5000, target_qps=7.0, min_query_count=3)
    assert server == Server(min_duration_ms=5000, target_qps=9.5, batch_size=4, min_query_count=3)
    assert single == SingleStream(min_duration_ms=5000, min_query_count=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_duration = 5", "min_duration: unknown; known: .*min_duration_ms"),
        ("[server]\ntarget_qps = 5", "server: unknown; known: Multi.*Server"),
        (
            "[Offline]\ntarget_latency_ms = 5",
            "Offline.target_latency_ms: unknown; known: .*target_qps",
        ),
        (
            "[Server]\ntarget_latency_ms = 12.7",
            "Server.target_latency_ms: a valid integer expected, not 12.7",
        ),
        ("[Server]\ntarget_qps = nan", "nan is no number"),
        ("[Server]\nbatch_size = 0", "Server.batch_size: greater than 0 expected, not 0"),
        ("[Server]\ntarget_qps = " + "[" * 100_000, "cannot read it: more than 64 lists"),
        ("batch_size = '8'", 'settings.toml: batch_size: a valid integer expected, not "8"'),
    ],
)
def test_bad_files_are_refused(text, message, tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text(text)
    with pytest.raises(HarnessError, match=message):
        load("Server", config)
        load("Offline", config)


WHOLE = st.integers(1, 2**63)
SPEED = st.floats(0, exclude_min=True, allow_infinity=False)


@given(
    st.one_of(
        st.builds(
            kind,
            **dict.fromkeys(("min_duration_ms", "min_query_count", "streams"), WHOLE),
            **{"performance_sample_count": WHOLE, **more},
        )
        for kind, more in (
            (Offline, {"target_qps": SPEED, "batch_size": WHOLE}),
            (
                Server,
                {
                    "target_qps": SPEED,
                    "target_latency_ms": WHOLE,
                    "batch_size": WHOLE,
                    "batch_delay_ms": SPEED | st.just(0.0),
                },
            ),
            (SingleStream, {"target_latency_ms": SPEED}),
            (MultiStream, {"target_latency_ms": SPEED, "samples_per_query": WHOLE}),
        )
    )
)
def test_settings_come_back(tmp_path_factory, made):
    path = tmp_path_factory.getbasetemp() / "settings.toml"
    path.write_text(tomlkit.dumps({made.scenario: dataclasses.asdict(made)}))
    assert load(made.scenario, path) == made


TABLES = Sample(
    {
        "Offline": {"target_qps": 900.5, "batch_size": 64, "streams": 2},
        "Server": {"target_qps": 800.0, "target_latency_ms": 100, "batch_delay_ms": 0.0},
        "SingleStream": {"target_latency_ms": 1.5, "min_query_count": 64},
        "MultiStream": {"samples_per_query": 8, "min_duration_ms": 1},
    }
)
# a table's place taken by a value makes that a setting of all scenarios, which is unknown
PLACES = ("replace", "add")


@given(damages(TABLES, PLACES))
def test_damage_is_named_by_its_path(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.toml"
    try:
        path.write_text(tomlkit.dumps(damage.document))
    except (ValueError, TypeError):
        assume(False)  # TOML has no null, and whole numbers of 64 bits
    with pytest.raises(HarnessError) as caught:
        load("Offline", path)
    assert str(caught.value).startswith(f"{path}: {damage.says}")
    assert len(str(caught.value).splitlines()) == 1


def test_an_override_that_no_scenario_has_is_refused():
    with pytest.raises(HarnessError, match="target_qps is no setting of SingleStream, MultiStream"):
        load_settings(["SingleStream", "MultiStream"], None, {"target_qps": 5.0})


@pytest.mark.parametrize("batch_seconds", [1e-9, 1e-5, 0.02, 3.0])
def test_estimates_leave_loadgen_enough_queries(batch_seconds):
    """LoadGen draws twice min_duration / expected latency, Offline 1.1 times qps * duration.

    But no more than 60 million for ten minutes, which are gigabytes, at which a query would have to
    take less than 10 us through Python to run out of them.
    """
    for kind in (SingleStream, MultiStream):
        expected = kind().estimated(batch_seconds).target_latency_ms
        assert 0 < expected < 2 * 1000 * max(batch_seconds, 11e-6)
        assert 2 * 600_000 / expected <= 60e6
    assert Offline(batch_size=4).estimated(batch_seconds).target_qps >= 4 / batch_seconds
    assert Server(batch_size=4).estimated(batch_seconds).target_qps < 4 / batch_seconds


def test_estimates_keep_what_the_user_set():
    for made in (
        Offline(target_qps=3.0),
        Server(target_qps=3.0),
        MultiStream(target_latency_ms=3.0),
    ):
        assert made.estimated(0.5) == made


def test_batch_fits_the_engine():
    assert fitted(Offline(), None).batch == 8
    assert fitted(Offline(), 3).batch == 3
    assert fitted(Server(batch_size=3), 3).batch == 3
    assert fitted(Offline(), 64, 32).batch == 32  # a plan's optimum
    assert fitted(Offline(), 4, 32).batch == 4
    assert fitted(Offline(batch_size=2), 64, 32).batch == 2
    with pytest.raises(HarnessError, match="batch size 4, but the engine takes at most 3"):
        fitted(Server(batch_size=4), 3)

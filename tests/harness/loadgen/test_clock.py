"""The wall clock, by which LoadGen measures, is set during a test; a test without a query."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest

from harness.errors import RunFailedError
from harness.loadgen import test as loadgen_test
from harness.loadgen.clock import Times, check_times
from harness.loadgen.settings import SCENARIOS
from harness.loadgen.sut import Sut
from harness.loadgen.test import run_test
from tests.support import ROOT, attempt
from tests.support.harness_fakes import FakeEngine, Memory, short


@pytest.fixture(scope="module")
def wall_clock(tmp_path_factory):
    """A library for LD_PRELOAD, by which a process sets its own CLOCK_REALTIME."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, cc")
    library = tmp_path_factory.mktemp("clock") / "wall_clock.so"
    source = ROOT / "tests" / "support" / "wall_clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def run_fake(library, step, directory, *arguments):
    fakes = "tests.support.harness_fakes"
    return attempt("-m", fakes, f"clock {step}", directory, *arguments, LD_PRELOAD=str(library))


@pytest.mark.parametrize("step", [-3, 3, -3600, 3600])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_clock_that_is_set_ends_the_run(scenario, step, wall_clock, tmp_path):
    """By 3 s LoadGen counts time that never was; by an hour it waits for it."""
    done = run_fake(wall_clock, step, tmp_path / "run", scenario, "PerformanceOnly", "30")
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{scenario} PerformanceOnly: the wall clock")
    assert f"(by {step:+.3f} s)" in line
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial" / "result.json").exists()


def test_a_test_that_gets_no_query_ends(wall_clock, tmp_path):
    """An accuracy run has no times, so there only what LoadGen then does counts: it waits."""
    arguments = ("Server", "AccuracyOnly", "0.5")
    done = run_fake(wall_clock, -3600, tmp_path / "run", *arguments)
    assert done.returncode == 1, done.stderr
    assert "Server AccuracyOnly: LoadGen has sent no query for 5 s" in done.stderr


@pytest.mark.slow
def test_a_slow_rate_is_no_pause(tmp_path, monkeypatch):
    """Two queries a second, and no patience beyond what their arrivals may take."""
    monkeypatch.setattr(loadgen_test, "_IDLE_SECONDS", 0.0)
    engine = FakeEngine()
    settings = short("Server", target_qps=2.0, min_query_count=4, min_duration_ms=2000)
    done = run_test((engine,), Memory(20), settings, "PerformanceOnly", tmp_path, timeout_s=0.5)
    assert done.detail.values["result_query_count"] >= 4


@pytest.fixture(scope="module", params=SCENARIOS)
def measured(request, tmp_path_factory):
    """A run's log, and our own times of it."""
    suts = []

    class Kept(Sut):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            suts.append(self)

    more = {"Server": {"target_qps": 100.0}, "Offline": {"target_qps": 2000.0}}
    more = {"min_duration_ms": 500, "min_query_count": 20, **more.get(request.param, {})}
    settings = short(request.param, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loadgen_test, "Sut", Kept)
        outcome = run_test(
            (FakeEngine(seconds=0.005),),
            Memory(20),
            settings,
            "PerformanceOnly",
            tmp_path_factory.mktemp("run"),
            timeout_s=30,
        )
    return request.param, outcome.detail.values, suts[0].times


def test_a_duration_that_was_not_is_refused(measured):
    scenario, values, times = measured
    check_times(scenario, values, times)
    end = ("last_query", "before_last", "last_completion", "handed_over")
    for step in (30.0, -30.0):  # seconds that LoadGen does not see, or sees twice
        moved = replace(times, **{name: getattr(times, name) + step for name in end})
        if step < 0 or scenario != "MultiStream":  # which logs no duration: see check_times
            with pytest.raises(RunFailedError, match=r"measured .* s for what took .* s"):
                check_times(scenario, values, moved)


def test_a_negative_latency_is_refused(measured):
    scenario, values, times = measured
    for key in (key for key in values if key.endswith("_latency_ns") and "result_" in key):
        with pytest.raises(RunFailedError, match="a latency of -4992 ms"):
            check_times(scenario, {**values, key: -4_992_000_000}, times)


@pytest.mark.parametrize(
    ("scenario", "key", "value"),
    [
        ("Offline", "result_max_latency_ns", 100e9),
        ("Server", "result_completed_samples_per_sec", 0.1),
        ("SingleStream", "result_qps_with_loadgen_overhead", 0.1),
        ("MultiStream", "result_mean_query_latency_ns", 100e9 / 11),
    ],
)
def test_the_slack_is_half_a_percent(scenario, key, value):
    """Of a log that says 100 s, in made-up times."""
    values = {"result_min_latency_ns": 1, "result_query_count": 11, key: value}

    def check(seconds):
        ends = ("last_query", "before_last", "last_completion", "handed_over")
        check_times(scenario, values, Times(**dict.fromkeys(ends, seconds)))

    for seconds in (99.51, 100.49):
        check(seconds)
    for seconds in (99.49, 100.51):
        if seconds < 100 or scenario != "MultiStream":
            with pytest.raises(RunFailedError, match=r"measured 100\.000 s for what took"):
                check(seconds)


def test_the_way_of_many_samples_into_python_is_no_difference(tmp_path):
    """LoadGen counts from before it hands over the query, here of 400,000 samples."""
    many = {"min_query_count": 400_000, "batch_size": 2000, "target_qps": 1.0}
    engine, settings = FakeEngine(), short("Offline", **many)
    done = run_test((engine,), Memory(20), settings, "PerformanceOnly", tmp_path, timeout_s=30)
    assert done.detail.values["generated_samples_per_query"] >= 400_000

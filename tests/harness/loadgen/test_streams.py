"""Runs on several sessions, devices and batches in flight, and what happens when one is lost."""

from __future__ import annotations

import gc
import os
import weakref

import numpy as np
import pytest

from engine.errors import SessionLostError
from engine.protocol import InputSpec
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.log import SUMMARY
from harness.loadgen.settings import SCENARIOS
from harness.loadgen.test import run_test
from harness.results.report import facts_of
from harness.results.result import RESULT, read_result
from harness.results.run import ERROR, run
from tests.support.harness_fakes import (
    TOTAL,
    FakeEngine,
    Memory,
    PipelinedEngine,
    assert_complete,
    benchmark,
    on_gpu,
    short,
)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_devices_streams_and_batches_in_flight(scenario, depth, tmp_path):
    engines = tuple(PipelinedEngine(depth, device=f"fake:{number}") for number in range(2))
    more = {"batch_size": 3} if scenario in {"Offline", "Server"} else {}
    settings = short(scenario, streams=2, **more)
    result = run(benchmark(*engines), settings, "AccuracyOnly", tmp_path / "run")
    assert_complete(tmp_path / "run")
    assert result.engine["devices"] == ["fake:0", "fake:1"]
    assert "device" not in result.engine
    assert result.settings["streams"] == 2
    assert (result.errors, result.warnings) == ((), ())
    sessions = [session for engine in engines for session in engine.sessions]
    assert [len(engine.sessions) for engine in engines] == [2, 2]
    assert all(session.taken == len(session.batches) for session in sessions)


def test_memory_of_samples_is_freed_when_the_run_is_over(tmp_path, monkeypatch):
    """Without the garbage collector, for it may be pinned, and there may be little of it."""
    engine = PipelinedEngine(2)
    arrays = []

    def host_array(shape, dtype):
        arrays.append(weakref.ref(array := np.empty(shape, dtype)))
        return array

    monkeypatch.setattr(engine, "host_array", host_array)
    gc.disable()
    try:
        run_test(
            (engine,), Memory(TOTAL), short("Offline"), "PerformanceOnly", tmp_path, timeout_s=30
        )
        engine.sessions.clear()  # which keep the batches that they were given
        assert arrays
        assert not any(array() is not None for array in arrays)
    finally:
        gc.enable()


def test_all_sessions_have_work_and_as_many_batches_in_flight_as_they_take(tmp_path):
    engines = tuple(PipelinedEngine(3, device=f"fake:{number}") for number in range(2))
    settings = short("Offline", streams=2, batch_size=4, min_query_count=2000, min_duration_ms=1)
    run_test(engines, Memory(TOTAL), settings, "PerformanceOnly", tmp_path, timeout_s=30)
    for engine in engines:
        for session in engine.sessions:
            assert session.most_in_flight == 3
            assert len(session.batches) > 50


def test_every_session_is_warm_for_every_size_before_loadgen_starts(tmp_path):
    seen = []

    class Watched(Memory):
        def read_into(self, batch, indices):
            seen.append([list(session.batches) for session in engine.sessions])
            super().read_into(batch, indices)

    engine = PipelinedEngine()
    settings = short("Server", streams=3, batch_size=6)
    run_test((engine,), Watched(TOTAL), settings, "PerformanceOnly", tmp_path, timeout_s=30)
    before_warm_up, before_the_run, *_ = seen
    assert before_warm_up == []
    assert [sizes[:6] for sizes in before_the_run] == [[1, 2, 3, 4, 5, 6]] * 3


@pytest.mark.parametrize("fault", ["lost in submit", "lost in result"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_others_do_what_a_lost_session_had(scenario, fault, tmp_path):
    engine = PipelinedEngine(fault=fault, batches_before_fault=11)  # those of the warm-up
    more = {"batch_size": 1} if scenario in {"Offline", "Server"} else {}
    settings = short(scenario, streams=3, **more)
    result = run(benchmark(engine), settings, "AccuracyOnly", tmp_path / "run")
    assert_complete(tmp_path / "run")
    assert result.errors == ()
    (warning,) = result.warnings
    assert warning == ("session 0 on fake:0 was lost, 2 of 3 left: the GPU has fallen off the bus")


@pytest.mark.parametrize("fault", ["lost in open", "lost in submit", "lost in result"])
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_the_others_go_on_without_a_session_lost_in_the_warm_up(scenario, before, fault, tmp_path):
    engine = PipelinedEngine(fault=fault, batches_before_fault=before)
    settings = short(scenario, streams=3, batch_size=3)
    result = run(benchmark(engine, timeout_s=5), settings, "AccuracyOnly", tmp_path / "run")
    assert_complete(tmp_path / "run")
    assert result.warnings == (
        "session 0 on fake:0 was lost, 2 of 3 left: the GPU has fallen off the bus",
    )
    assert all(session.closed for session in engine.sessions)


@pytest.mark.parametrize("fault", ["lost in open", "lost in submit", "lost in result"])
def test_a_warm_up_that_no_session_survives_ends_the_run(fault, tmp_path):
    engine = PipelinedEngine(fault=fault, all_faulty=True, batches_before_fault=1)
    with pytest.raises(RunFailedError, match="PerformanceOnly: the GPU has fallen off the bus"):
        run(benchmark(engine), short("Server", streams=3), "PerformanceOnly", tmp_path / "run")
    assert "fallen off the bus" in (tmp_path / "run.partial" / ERROR).read_text()


def test_settings_that_loadgen_refuses_leave_no_session_open(tmp_path):
    engine = PipelinedEngine()
    settings = short("SingleStream", streams=2, min_query_count=2**70)
    with pytest.raises(HarnessError, match="LoadGen took min_query_count"):
        run(benchmark(engine), settings, "PerformanceOnly", tmp_path / "run")
    assert [session.closed for session in engine.sessions] == [True, True]
    partial = tmp_path / "run.partial"
    assert "HarnessError: LoadGen took min_query_count" in (partial / ERROR).read_text()


def test_a_performance_run_with_a_lost_session_counts(tmp_path):
    engine = PipelinedEngine(fault="lost in result")
    settings = short("Offline", streams=2)
    result = run(benchmark(engine), settings, "PerformanceOnly", tmp_path / "run")
    assert result.valid, result.errors
    assert len(result.warnings) == 1


@pytest.mark.parametrize("fault", ["lost in submit", "lost in result", "lost in open"])
@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_a_performance_run_that_loses_a_gpu_is_of_fewer_and_not_valid(scenario, fault, tmp_path):
    engines = (on_gpu(0), on_gpu(1, fault=fault, all_faulty=True))
    settings = short(scenario, streams=2, min_query_count=600)
    result = run(benchmark(*engines), settings, "PerformanceOnly", tmp_path / "run")
    assert "Result is : VALID" in (tmp_path / "run" / SUMMARY).read_text()
    assert result.valid is False
    assert result.lost_devices == ("fake:1 (GPU-1)",)
    assert "fake:1 (GPU-1) lost: a figure of 1 of 2 devices" in result.errors[-1]
    assert sorted(warning.partition(":1 (GPU-1) was lost")[0] for warning in result.warnings) == [
        "session 0 on fake",
        "session 1 on fake",
    ]
    assert read_result(tmp_path / "run" / RESULT) == result
    assert facts_of(tmp_path / "run", result)["LoadGen"] == "INVALID, 1 of 2 lost"
    assert facts_of(tmp_path / "run", result)["device"] == "2 x NVIDIA H200"


def test_an_accuracy_run_that_loses_a_gpu_is_complete_and_says_so(tmp_path):
    engines = (on_gpu(0, fault="lost in result", batches_before_fault=11), on_gpu(1))
    settings = short("Offline", batch_size=1)
    result = run(benchmark(*engines), settings, "AccuracyOnly", tmp_path / "run")
    assert_complete(tmp_path / "run")
    assert (result.valid, result.errors) == (None, ())
    assert result.lost_devices == ("fake:0 (GPU-0)",)
    assert "fake:0 (GPU-0) was lost, 1 of 2 left" in result.warnings[0]
    assert facts_of(tmp_path / "run", result)["LoadGen"] == "1 of 2 lost"


def test_a_result_names_every_gpu_and_what_its_engine_has_of_its_own(tmp_path):
    engines = (on_gpu(0), on_gpu(1))
    result = run(benchmark(*engines), short("Offline"), "AccuracyOnly", tmp_path / "run")
    assert result.engine["devices"] == ["fake:0", "fake:1"]
    first, second = result.engine["gpus"]
    assert first == {**engines[0].more["running_on"], "manifest": {}}
    assert second == {**engines[1].more["running_on"], "manifest": {"kernels": {"conv": "1"}}}
    assert result.engine["kernels"] == {"conv": "0"}
    assert "running_on" not in result.engine


@pytest.mark.parametrize("mode", ["AccuracyOnly", "PerformanceOnly"])
def test_the_loss_of_the_last_gpu_is_an_error(mode, tmp_path):
    engines = tuple(
        on_gpu(number, fault="lost in result", batches_before_fault=11 + number, all_faulty=True)
        for number in range(2)
    )
    settings = short("Offline", batch_size=1, min_query_count=5000)
    with pytest.raises(RunFailedError, match="the GPU has fallen off the bus") as caught:
        run(benchmark(*engines), settings, mode, tmp_path / "run")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run").exists()


def test_samples_go_to_memory_of_a_gpu_that_is_left(tmp_path):
    """The first one's is asked for when LoadGen loads, and that is lost in the warm-up."""
    engines = (on_gpu(0, fault="lost in open", all_faulty=True), on_gpu(1))

    def gone(_shape, _dtype, kept=engines[0].host_array):
        if engines[1].sessions:
            raise SessionLostError("the GPU has fallen off the bus")
        return kept(_shape, _dtype)

    engines[0].host_array = gone
    result = run(benchmark(*engines), short("Offline"), "AccuracyOnly", tmp_path / "run")
    assert_complete(tmp_path / "run")
    assert result.lost_devices == ("fake:0 (GPU-0)",)


def test_a_run_ends_with_its_last_session(tmp_path):
    engine = PipelinedEngine(fault="lost in result", all_faulty=True)
    settings = short("Offline", streams=3, min_query_count=5000)
    with pytest.raises(RunFailedError, match="PerformanceOnly: the GPU has fallen off the bus"):
        run(benchmark(engine), settings, "PerformanceOnly", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["error in submit", "error in result", "memory in result"])
@pytest.mark.parametrize("scenario", ["Offline", "Server", "MultiStream"])
def test_any_other_error_of_one_session_ends_the_run(scenario, fault, tmp_path):
    engine = PipelinedEngine(fault=fault, batches_before_fault=BEFORE[scenario])
    settings = short(scenario, streams=3, **MANY[scenario])
    message = "out of memory" if fault.startswith("memory") else "RuntimeError: no more luck"
    with pytest.raises(RunFailedError, match=f"PerformanceOnly: .*{message}"):
        run(benchmark(engine), settings, "PerformanceOnly", tmp_path / "run")
    assert not (tmp_path / "run").exists()


BEFORE = {"Offline": 30, "Server": 30, "MultiStream": 15}
MANY = {
    "Offline": {"min_query_count": 5000},
    "Server": {"min_query_count": 2000, "target_qps": 20_000.0},
    "MultiStream": {"min_query_count": 200},
}


def test_work_and_memory_stay_next_to_the_gpu(tmp_path, monkeypatch):
    """Threads of a device's sessions, and whoever allocates, on the CPUs of its NUMA node."""
    here = os.sched_getaffinity(0)
    near = frozenset({min(here)})
    seen: dict[str, set[frozenset[int]]] = {}

    def note(name):
        seen.setdefault(name, set()).add(frozenset(os.sched_getaffinity(0)))

    class Watched(PipelinedEngine):
        def session(self):
            session = super().session()
            for name in ("submit", "result"):
                genuine = getattr(session, name)

                def call(*given, genuine=genuine, name=name):
                    note(f"{name} {self.device}")
                    return genuine(*given)

                setattr(session, name, call)
            return session

        def host_array(self, shape, dtype):
            note("memory")
            return super().host_array(shape, dtype)

    def cpus(device):
        return near if device == "fake:0" else None

    monkeypatch.setattr("harness.loadgen.lane.gpu_cpus", cpus)
    monkeypatch.setattr("harness.loadgen.test.gpu_cpus", cpus)
    engines = (Watched(), Watched(device="fake:1"))
    settings = short("Offline", performance_sample_count=30, min_query_count=500)
    run_test(engines, Memory(TOTAL), settings, "PerformanceOnly", tmp_path, timeout_s=30)
    assert seen == {
        "memory": {near},
        "submit fake:0": {near},
        "result fake:0": {near},
        "submit fake:1": {frozenset(here)},
        "result fake:1": {frozenset(here)},
    }
    assert os.sched_getaffinity(0) == here


def test_engines_that_differ_are_refused():
    other_images = FakeEngine()
    other_images.input_spec = InputSpec("image", (3, 8, 8), "float32")
    with pytest.raises(HarnessError, match="different images"):
        benchmark(FakeEngine(), other_images)
    other_model = FakeEngine()
    other_model.manifest = {"backend": "fake", "onnx_sha256": "11"}
    with pytest.raises(HarnessError, match="different models: SHA-256 None, 11"):
        benchmark(FakeEngine(), other_model)

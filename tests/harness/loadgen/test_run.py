"""LoadGen for real: every scenario in both modes, with engines whose answers are known."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest

from engine.support.progress import progress_bar
from harness.data.dataset import known_dataset
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.log import ACCURACY, DETAIL, SUMMARY, read_complete
from harness.loadgen.settings import MODES, SCENARIOS
from harness.loadgen.test import run_test
from harness.lock import locked
from harness.results.report import find_results, print_table
from harness.results.result import read_result
from harness.results.run import run
from harness.results.run_all import new_folder
from tests.support import ROOT
from tests.support.harness_fakes import (
    TOTAL,
    FakeEngine,
    Memory,
    assert_complete,
    benchmark,
    short,
)


@pytest.mark.parametrize("max_batch", [None, 3], ids=["any batch", "batch 3"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_accuracy_run(scenario, max_batch, tmp_path):
    engine = FakeEngine(max_batch)
    result = run(benchmark(engine), short(scenario), "AccuracyOnly", tmp_path / "run")
    assert_complete(tmp_path / "run")
    assert result.metric == "mAP"
    assert result.value is None and result.valid is None
    assert result.errors == ()
    assert engine.closed
    assert not (tmp_path / "run.partial").exists()


def parse(summary, label):
    (line,) = [line for line in summary.splitlines() if line.startswith(label)]
    return float(line.partition(":")[2])


@pytest.mark.parametrize(
    ("scenario", "more", "label", "factor"),
    [
        ("Offline", {}, "Samples per second", 1),
        ("Server", {"target_qps": 200.0}, "Completed samples per second", 1),
        # whose 90th percentile takes 64 queries, the 99th of the next 662
        ("SingleStream", {"min_query_count": 64}, "90.0th percentile latency (ns)", 1e-6),
        ("MultiStream", {"min_query_count": 662}, "99.0th percentile latency (ns)", 1e-6),
    ],
)
def test_performance_run(scenario, more, label, factor, tmp_path):
    engine = FakeEngine(seconds=0.001)
    settings = short(scenario, **{"min_duration_ms": 200, **more})
    result = run(benchmark(engine), settings, "PerformanceOnly", tmp_path / "run")
    summary = (tmp_path / "run" / SUMMARY).read_text()
    assert f"Scenario : {scenario}" in summary
    # few queries in little time: LoadGen's own verdict, which the report must repeat
    assert ("Result is : VALID" in summary) == result.valid
    assert result.valid == (result.errors == ())
    if scenario != "Server":  # which needs 459 queries in time to be sure of its 99 %
        assert result.valid, result.errors
    assert result.value == pytest.approx(parse(summary, label) * factor, rel=1e-4)
    latency = result.latency_ms
    p99 = parse(summary, "99.00 percentile latency (ns)") * 1e-6
    assert latency["p99"] == pytest.approx(p99, rel=1e-4)
    assert 1 <= latency["min"] <= latency["p50"] <= latency["p99"] <= latency["max"]
    assert result.batch_latency_ms["min"] >= 1
    assert result.settings["loadgen"]["performance_sample_count"] == 20
    assert result.versions["loadgen"].startswith("6.")
    assert max(engine.batches) == (1 if scenario == "SingleStream" else 8)
    assert read_result(tmp_path / "run" / "result.json") == result


def test_offline_batches_are_full_but_the_last(tmp_path):
    engine = FakeEngine()
    settings = short(
        "Offline", min_query_count=103, min_duration_ms=1, target_qps=1.0, batch_size=10
    )
    outcome = run_test(
        (engine,), Memory(TOTAL), settings, "PerformanceOnly", tmp_path, timeout_s=30
    )
    issued = len(outcome.batch_seconds)
    assert engine.batches[-issued:] == [10] * 10 + [3]


@pytest.mark.parametrize(("delay", "grown"), [(0.0, False), (20.0, True)])
def test_server_waits_for_company(tmp_path, delay, grown):
    """A sample a millisecond and an instant engine: only waiting makes batches of several."""
    engine = FakeEngine()
    settings = short(
        "Server", target_qps=1000.0, batch_size=64, batch_delay_ms=delay, min_duration_ms=200
    )
    outcome = run_test(
        (engine,), Memory(TOTAL), settings, "PerformanceOnly", tmp_path, timeout_s=30
    )
    batches = engine.batches[-len(outcome.batch_seconds) :]
    assert (np.median(batches) > 3) == grown


@pytest.mark.parametrize("first", [0, 1])
def test_labels_count_from_the_engines_first(tmp_path, first):
    """As `harness tune` runs it, without annotations."""
    engine = FakeEngine(fault="background")
    engine.manifest = {"backend": "fake", "first_label": first}
    settings = short("Offline", target_qps=1.0)
    given = (engine,), Memory(TOTAL), settings, "AccuracyOnly", tmp_path
    if first == 0:
        run_test(*given, timeout_s=30)
        return
    with pytest.raises(RunFailedError, match=r"a label outside 1\.\."):
        run_test(*given, timeout_s=30)


def test_a_stale_audit_config_has_no_effect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.config").write_text("*.*.mode = 1\n")
    run(benchmark(FakeEngine()), short("Offline"), "PerformanceOnly", tmp_path / "run")
    assert "Mode     : PerformanceOnly" in (tmp_path / "run" / SUMMARY).read_text()


def test_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.loadgen.test._POLLS_PER_REPORT", 1)
    told = []
    run_test(
        (FakeEngine(seconds=0.005),),
        Memory(TOTAL),
        short("SingleStream"),
        "AccuracyOnly",
        tmp_path,
        timeout_s=30,
        progress=lambda completed, total: told.append((completed, total)),
    )
    completed = [item[0] for item in told]
    assert completed == sorted(completed)
    assert 0 < completed[0] < completed[-1] == TOTAL
    assert {total for _, total in told} == {TOTAL}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of a complete run in each mode."""
    folder = tmp_path_factory.mktemp("runs")
    for mode in ("PerformanceOnly", "AccuracyOnly"):
        run(benchmark(FakeEngine()), short("Offline"), mode, folder / mode)
    return folder


def test_the_table_shows_paths_and_messages_as_they_are(finished, tmp_path, capsys):
    """Rich would read [nightly] as a style and [/v1] as the end of one."""
    folder = tmp_path / "[nightly]" / "[/v1]" / "[bold]"
    result = read_result(finished / "PerformanceOnly" / "result.json")
    print_table([(folder, replace(result, pictures="[red]", warnings=("an [unfit] [/word]",)))])
    shown = capsys.readouterr().out
    assert f"logs in {folder}\n" in shown
    assert f"pictures in {folder}/[red]\n" in shown
    assert "an [unfit] [/word]\n" in shown


def test_a_progress_bar_shows_its_title_as_it_is(monkeypatch):
    terminal = StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar("a[b] [/v1] {x}.zip") as progress:
        progress(1, 2)
    assert "a[b] [/v1] {x}.zip" in terminal.getvalue()


def test_an_existing_run_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(HarnessError, match="exists"):
        run(benchmark(FakeEngine()), short("Offline"), "PerformanceOnly", tmp_path / "run")


def test_a_run_takes_the_place_of_an_unfinished_one(tmp_path):
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "result.json").write_text("{")
    with pytest.raises(HarnessError, match="no result"):
        find_results([tmp_path])
    result = run(benchmark(FakeEngine()), short("Offline"), "PerformanceOnly", tmp_path / "run")
    assert find_results([tmp_path]) == [(tmp_path / "run", result)]


def test_after_a_failed_run_the_next_one_works(tmp_path):
    bad = benchmark(FakeEngine(fault="raise"))
    with pytest.raises(RunFailedError, match="Offline AccuracyOnly: RuntimeError: no more memory"):
        run(bad, short("Offline", batch_size=2), "AccuracyOnly", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "bad.partial" / ACCURACY).exists()
    assert "in infer" in (tmp_path / "bad.partial" / "error.txt").read_text()
    good = run(benchmark(FakeEngine()), short("Offline"), "AccuracyOnly", tmp_path / "good")
    assert good.errors == ()


def test_nothing_is_removed_that_another_run_may_have_made(tmp_path, monkeypatch):
    """The log of a failed run goes before its lock does."""
    there = []

    @contextmanager
    def watched(*arguments, **options):
        with locked(*arguments, **options):
            try:
                yield
            finally:
                there.append((tmp_path / "run.partial" / ACCURACY).exists())

    monkeypatch.setattr("harness.results.run.locked", watched)
    bad = benchmark(FakeEngine(fault="raise"))
    with pytest.raises(RunFailedError, match="no more memory"):
        run(bad, short("Offline", batch_size=2), "AccuracyOnly", tmp_path / "run")
    assert there == [False]


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_held_against_the_categories(mode, tmp_path, monkeypatch):
    """The demo's annotations have 80."""
    monkeypatch.chdir(ROOT)
    demo = known_dataset("demo", "val", tmp_path)
    wrong = replace(benchmark(FakeEngine(fault="label", seconds=0.002)), dataset=demo)
    settings = short("Offline", min_duration_ms=300)
    with pytest.raises(RunFailedError, match=r"a label outside 1\.\.80 .* 81\)"):
        run(wrong, settings, mode, tmp_path / "run")


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("PerformanceOnly", DETAIL),
        ("PerformanceOnly", SUMMARY),
        ("AccuracyOnly", DETAIL),
        ("AccuracyOnly", SUMMARY),
        ("AccuracyOnly", ACCURACY),
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, None], ids=["empty", "30 %", "90 %", "missing"])
def test_cut_logs_are_refused(mode, name, kept, finished, tmp_path):
    for path in (finished / mode).glob("mlperf_log_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    read_complete(tmp_path, accuracy=mode == "AccuracyOnly")
    path = tmp_path / name
    content = path.read_bytes()
    if kept is None:
        path.unlink()
    else:
        path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(HarnessError, match=name.replace(".", r"\.")):
        read_complete(tmp_path, accuracy=mode == "AccuracyOnly")


def test_an_accuracy_log_without_a_sample_is_refused(finished, tmp_path):
    for path in (finished / "AccuracyOnly").glob("mlperf_log_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    log = json.loads((tmp_path / ACCURACY).read_text())
    (tmp_path / ACCURACY).write_text(json.dumps(log[:-1]))
    with pytest.raises(HarnessError, match=f"{TOTAL - 1} of {TOTAL} samples"):
        read_complete(tmp_path, accuracy=True)


def test_every_run_has_a_log_folder_of_its_own(tmp_path):
    """Also those that begin in the same second."""
    folders = [new_folder(tmp_path / "build") for _ in range(5)]
    assert len(set(folders)) == 5
    assert {folder.parent for folder in folders} == {tmp_path / "build"}
    assert all(folder.is_dir() for folder in folders)
    (tmp_path / "file").touch()
    with pytest.raises(HarnessError, match="cannot make it"):
        new_folder(tmp_path / "file")

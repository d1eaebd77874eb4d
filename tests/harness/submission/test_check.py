"""The checker of a submission tree must find every fault planted in a good one."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.submission.check import check_submission
from tests.support.compliance_runs import SYSTEM
from tests.support.submissions import DETAIL, LOG, MODEL, SUMMARY, edit_log, errors


def add_error(path):
    lines = path.read_text().splitlines(keepends=True)
    entry = json.loads(lines[-1].removeprefix(":::MLLOG "))
    entry |= {"key": "error_runtime", "value": "boom"}
    entry["metadata"]["is_error"] = True
    path.write_text("".join([f":::MLLOG {json.dumps(entry)}\n", *lines]))


def test_a_good_tree_has_no_errors(good):
    assert errors(good) == []
    seeds = [item for item in check_submission(good) if "rng_seed" in item.message]
    assert len(seeds) == 6  # three in each scenario: LoadGen 6 has other ones than v2.0


@pytest.fixture
def tree(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path


def replace(old, new):
    def change(path):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def json_without(field):
    def change(path):
        values = json.loads(path.read_text())
        del values[field]
        path.write_text(json.dumps(values))

    return change


def log_value(**values):
    return lambda path: edit_log(path, **values)


def write(text):
    return lambda path: path.write_text(text)


def keep(part):
    return lambda path: path.write_bytes(path.read_bytes()[part])


SUMMARY_FILE = f"results/{MODEL}/Server/performance/run_1/{SUMMARY}"
PERFORMANCE = f"results/{MODEL}/Server/performance/run_1/{DETAIL}"
OFFLINE = f"results/{MODEL}/Offline/performance/run_1/{DETAIL}"
ACCURACY = f"results/{MODEL}/Server/accuracy"
MEASUREMENTS = f"measurements/{MODEL}/Server"
COMPLIANCE = f"compliance/{MODEL}/Server"
SYSTEM_FILE = f"systems/{SYSTEM}.json"
FAULTS = [
    (PERFORMANCE, log_value(result_validity="INVALID"), "the run is INVALID"),
    (PERFORMANCE, add_error, "LoadGen reported an error: error_runtime: boom"),
    (PERFORMANCE, log_value(effective_performance_sample_count=63), "count is 63; at least 64"),
    (PERFORMANCE, log_value(effective_min_duration_ms=599_999), "at least 600000"),
    (PERFORMANCE, log_value(effective_target_latency_ns=100_000_001), "at most 100000000"),
    (PERFORMANCE, log_value(early_stopping_met=False), "early_stopping_met"),
    (PERFORMANCE, log_value(effective_scenario="Offline"), "scenario is Offline, not Server"),
    (PERFORMANCE, log_value(effective_test_mode="AccuracyOnly"), "not PerformanceOnly"),
    (OFFLINE, log_value(effective_samples_per_query=24_575), "at least 24576"),
    (f"{ACCURACY}/{DETAIL}", add_error, "error_runtime: boom"),
    (f"{ACCURACY}/{DETAIL}", log_value(effective_accuracy_sample_count=4952), "at least 5000"),
    (f"{ACCURACY}/{DETAIL}", log_value(effective_test_mode="PerformanceOnly"), "not AccuracyOnly"),
    (f"{ACCURACY}/accuracy.txt", write("mAP=19.799%\nhash=" + 64 * "0"), "19.799 %; the target"),
    (f"{ACCURACY}/accuracy.txt", replace("mAP", "map"), "no line mAP"),
    (f"{ACCURACY}/accuracy.txt", replace("hash=", "hash: "), "no line hash"),
    (f"{ACCURACY}/{LOG}", write("[" + 10_240 * " "), "10241 bytes; must be truncated"),
    (f"{ACCURACY}/{LOG}", write("[]"), "its SHA-256 is not the hash"),
    (f"{ACCURACY}/notes.txt", write("x"), "does not belong here"),
    (SYSTEM_FILE, replace("Acme", "Other"), "submitter is 'Other', the folder is Acme"),
    (SYSTEM_FILE, replace('"closed"', '"open"'), "division is 'open', the folder is closed"),
    (SYSTEM_FILE, replace("available", "soon"), "status is 'soon'"),
    (SYSTEM_FILE, replace('"datacenter"', '"phone"'), "system_type is 'phone'"),
    (SYSTEM_FILE, json_without("cooling"), "field 'cooling' is missing"),
    (SYSTEM_FILE, write("{"), "no JSON"),
    (f"{MEASUREMENTS}/box_fake_Server.json", json_without("retraining"), "'retraining' is missing"),
    (f"{COMPLIANCE}/TEST01/verify_performance.txt", write("TEST FAIL\n"), "no TEST PASS"),
    (f"{COMPLIANCE}/TEST04-A/verify_performance.txt", write("TEST FAIL\n"), "no TEST PASS"),
    (f"{COMPLIANCE}/TEST01/verify_performance.txt", write("no TEST PASS\n"), "no TEST PASS"),
    (
        f"{COMPLIANCE}/TEST01/performance/run_1/{DETAIL}",
        log_value(result_scheduled_samples_per_sec=1.0),
        "the logs do not pass TEST01: reference 100, test 1",
    ),
    (
        f"{COMPLIANCE}/TEST04-B/performance/run_1/{DETAIL}",
        log_value(result_scheduled_samples_per_sec=1e9),
        "the logs do not pass TEST04-B",
    ),
    (
        f"{COMPLIANCE}/TEST05/performance/run_1/{DETAIL}",
        log_value(result_validity="INVALID"),
        "the run is INVALID",
    ),
    (PERFORMANCE, log_value(effective_performance_issue_same=True), "issue_same is True"),
    (PERFORMANCE, log_value(effective_target_latency_percentile=0.5), "percentile is 0.5, not"),
    (f"{ACCURACY}/accuracy.txt", replace("mAP=", "mAP=2.0.1"), "no line mAP"),
    (
        f"{COMPLIANCE}/TEST01/performance/run_1/{DETAIL}",
        log_value(effective_accuracy_log_sampling_target=0),
        "logs no answers",
    ),
    (
        f"{COMPLIANCE}/TEST04-A/performance/run_1/{DETAIL}",
        log_value(effective_performance_issue_unique=False),
        "does not issue unique samples",
    ),
    (
        f"{COMPLIANCE}/TEST04-B/performance/run_1/{DETAIL}",
        log_value(effective_performance_issue_same=False),
        "does not issue the same sample",
    ),
    (
        f"{COMPLIANCE}/TEST05/performance/run_1/{DETAIL}",
        log_value(effective_qsl_rng_seed=2085463073848966840),  # LoadGen 6.0's ordinary one
        "qsl_rng_seed is that of the performance run",
    ),
    (f"{COMPLIANCE}/TEST05/performance/run_1/{DETAIL}", add_error, "error_runtime: boom"),
    (
        f"{COMPLIANCE}/TEST01/performance/run_1/{DETAIL}",
        log_value(effective_test_mode="AccuracyOnly"),
        "effective_test_mode is AccuracyOnly, not PerformanceOnly",
    ),
    (
        f"{COMPLIANCE}/TEST04-A/performance/run_1/{DETAIL}",
        log_value(effective_scenario="Offline"),
        "scenario is Offline, not Server",
    ),
    (
        f"{COMPLIANCE}/TEST05/performance/run_1/{SUMMARY}",
        replace("is : VALID", "is : INVALID"),
        "'Result is' is INVALID; the detail log's result_validity is VALID",
    ),
    (
        f"{COMPLIANCE}/TEST05/performance/run_1/{DETAIL}",
        log_value(result_scheduled_samples_per_sec="fast"),
        "cannot be compared with",
    ),
    (PERFORMANCE, log_value(effective_performance_issue_unique=True), "issue_unique is True"),
    (SUMMARY_FILE, replace("is : VALID", "is : INVALID"), "'Result is' is INVALID"),
    (SUMMARY_FILE, replace("Scenario : Server", "Scenario : Offline"), "'Scenario' is Offline"),
    (f"{ACCURACY}/accuracy.txt", write("mAP=120.0%\nhash=" + 64 * "0"), "no line mAP"),
    (f"{ACCURACY}/{SUMMARY}", write(""), "the log is cut off"),
    (f"{ACCURACY}/{LOG}", keep(slice(0, 4200)), "lacks the beginning or the end"),
    (f"{ACCURACY}/{LOG}", keep(slice(4000, None)), "lacks the beginning or the end"),
    (f"{ACCURACY}/{LOG}", write("[\n\n...\n\n]"), "less than 4096 bytes of each end"),
    (f"{ACCURACY}/{LOG}", write("[]"), "both ends of 5000 answers"),
]


@pytest.mark.parametrize(("name", "plant", "words"), FAULTS, ids=[f[2][:40] for f in FAULTS])
def test_every_planted_fault_is_found(name, plant, words, tree):
    path = tree / "closed" / "Acme" / name
    plant(path)
    found = errors(tree)
    assert any(item.path == path and words in item.message for item in found), found
    assert all("\n" not in str(item) for item in found)


def test_a_cut_compliance_log_is_found(tree):
    folder = tree / "closed" / "Acme" / COMPLIANCE / "TEST04-A" / "performance" / "run_1"
    log = folder / DETAIL
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"num_errors"' not in line))
    assert [item.path for item in errors(tree) if "the log is cut off" in item.message] == [folder]


def test_multistream_issues_eight_samples_a_query(tree):
    results = tree / "closed" / "Acme" / "results" / MODEL
    shutil.copytree(results / "Server", results / "MultiStream")
    log = results / "MultiStream" / "performance" / "run_1" / DETAIL
    for count, wrong in ((1, True), (8, False)):
        edit_log(log, effective_scenario="MultiStream", effective_samples_per_query=count)
        found = [item for item in errors(tree) if "effective_samples_per_query" in item.message]
        assert [item.path for item in found] == [log] * wrong


@pytest.mark.slow
def test_every_missing_file_is_found(good, tmp_path):
    folders = ("systems", "measurements", "results", "compliance")
    files = [path for name in folders for path in (good / "closed/Acme" / name).rglob("*.*")]
    required = [path for path in files if path.name != "calibration_process.md"]
    assert len(required) > 35
    for path in required:
        hidden = path.rename(tmp_path / "hidden")
        try:
            found = errors(good)
        finally:
            hidden.rename(path)
        assert any(path.is_relative_to(item.path) for item in found), path


@pytest.mark.parametrize(
    "folder",
    [
        f"results/{MODEL}/Server",
        f"results/{MODEL}/Server/accuracy",
        f"results/{MODEL}/Server/performance",
        f"measurements/{MODEL}/Offline",
        f"compliance/{MODEL}/Offline/TEST04-B",
        "code",
        "systems",
    ],
)
def test_every_missing_folder_is_found(folder, tree):
    shutil.rmtree(tree / "closed" / "Acme" / folder)
    assert errors(tree)


@settings(max_examples=25)
@given(data=st.data())
def test_damage_is_reported_and_never_crashes(data, good, tmp_path):
    files = sorted(path for path in good.rglob("*") if path.is_file() and "code" not in path.parts)
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=20))
    path.write_bytes(whole[:cut] + junk)
    try:
        found = check_submission(good)
    finally:
        path.write_bytes(whole)
    assert all(item.path.is_relative_to(good) and item.message for item in found)


def test_answers_that_differ_need_the_same_map(tree):
    folder = tree / "closed" / "Acme" / COMPLIANCE / "TEST01"
    replace("TEST PASS", "TEST FAIL")(folder / "verify_accuracy.txt")
    assert any("baseline_accuracy.txt" in str(item) for item in errors(tree))
    (folder / "accuracy" / "baseline_accuracy.txt").write_text("mAP=20.000%\n")
    for value, wrong in (("19.810", False), ("19.790", True), ("20.210", True)):
        (folder / "accuracy" / "compliance_accuracy.txt").write_text(f"mAP={value}%\n")
        assert bool(errors(tree)) == wrong

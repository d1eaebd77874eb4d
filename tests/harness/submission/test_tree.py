"""The submission tree, and a checker that must find every fault planted in a good one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.results.accuracy import evaluate
from harness.submission.check import check_submission
from harness.submission.compliance import check_compliance, find_bases
from harness.submission.description import MEASUREMENT_FIELDS, SYSTEM_FIELDS, load_description
from harness.submission.tree import truncated, write_submission
from tests.support import ROOT
from tests.support.compliance_runs import SYSTEM, CheatingEngine, base_runs, benchmark

LOG = "mlperf_log_accuracy.json"
DETAIL = "mlperf_log_detail.txt"
SUMMARY = "mlperf_log_summary.txt"
TESTS = ("TEST01", "TEST04-A", "TEST04-B", "TEST05")
OWNER = """
status = "available"
system_type = "datacenter"
accelerators_per_node = 2
[measurements]
retraining = "N"
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs and compliance tests of a datacenter system, too short to be submitted."""
    root = tmp_path_factory.mktemp("runs")
    bench = benchmark(root / "data", CheatingEngine(seconds=0.002))
    base_runs(bench, root / "logs", "Offline", min_query_count=300)
    base_runs(bench, root / "logs", "Server", target_qps=500.0)
    for base in find_bases([root / "logs"]):
        for test in ("TEST01", "TEST04", "TEST05"):
            check_compliance(bench, base, test)
    return root


def owner(folder):
    path = folder / "system.toml"
    path.write_text(OWNER)
    return load_description(path)


def submit(runs, output, division="closed"):
    return write_submission(
        find_bases([runs / "logs"]),
        submitter="Acme",
        division=division,
        description=owner(output),
        output=output,
    )


def test_the_tree(runs, tmp_path):
    """Every file that v2.0's submission checker asks for, and what it looks for inside."""
    root, notes = submit(runs, tmp_path)
    assert root == tmp_path / "closed" / "Acme"
    assert {path.name for path in tmp_path.iterdir()} == {"closed", "system.toml"}
    system = json.loads((root / "systems" / f"{SYSTEM}.json").read_text())
    assert set(system) == set(SYSTEM_FIELDS) and len(system) == 33
    assert (system["submitter"], system["division"]) == ("Acme", "closed")
    assert (system["system_name"], system["accelerators_per_node"]) == (SYSTEM, 2)
    assert system["cooling"] == ""
    assert any("systems/box.json: empty" in note and "cooling" in note for note in notes)
    for scenario in ("Offline", "Server"):
        source = runs / "logs" / SYSTEM / "ssd-resnet34" / scenario
        place = Path(SYSTEM) / "ssd-resnet34" / scenario
        results = root / "results" / place
        run_1 = results / "performance" / "run_1"
        assert {path.name for path in run_1.iterdir()} == {SUMMARY, DETAIL}
        assert (run_1 / DETAIL).read_bytes() == (source / "PerformanceOnly" / DETAIL).read_bytes()
        accuracy = results / "accuracy"
        names = {path.name for path in accuracy.iterdir()}
        assert names == {SUMMARY, DETAIL, LOG, "accuracy.txt"}
        whole = (source / "AccuracyOnly" / LOG).read_bytes()
        kept = (accuracy / LOG).read_bytes()
        assert len(whole) > 10240 >= len(kept)
        text = (accuracy / "accuracy.txt").read_text()
        assert f"hash={hashlib.sha256(whole).hexdigest()}\n" in text
        data = runs / "data"
        names = tuple((data / "map.txt").read_text().split())
        value = evaluate(source / "AccuracyOnly" / LOG, data / "annotations.json", names).mAP
        assert float(re.search(r"^mAP=([\d.]+)", text)[1]) == pytest.approx(100 * value, abs=1e-3)
        measurements = root / "measurements" / place
        for name in ("mlperf.conf", "README.md", "calibration_process.md"):
            assert (measurements / name).read_text()
        for mode in ("AccuracyOnly", "PerformanceOnly"):
            command = json.loads((source / mode / "result.json").read_text())["command"]
            assert f"    {command}\n" in (measurements / "README.md").read_text()
        conf = (source / "PerformanceOnly" / "user.conf").read_bytes()
        assert (measurements / "user.conf").read_bytes() == conf
        values = json.loads((measurements / f"{SYSTEM}_fake_{scenario}.json").read_text())
        assert set(values) == set(MEASUREMENT_FIELDS)
        assert values["retraining"] == "N"
        compliance = root / "compliance" / place
        assert {path.name for path in compliance.iterdir()} == set(TESTS)
        for test in TESTS:
            folder = compliance / test
            names = {path.name for path in (folder / "performance" / "run_1").iterdir()}
            assert names == {SUMMARY, DETAIL}
            assert (folder / "verify_performance.txt").exists() == (test != "TEST04-B")
        answers = compliance / "TEST01" / "accuracy"
        whole = (source / "TEST01" / LOG).read_bytes()
        text = (answers / "accuracy.txt").read_text()
        assert text == f"hash={hashlib.sha256(whole).hexdigest()}\n"
    assert any((root / "code" / "ssd-resnet34" / "fake").iterdir())


def edit_log(path, **values):
    """Give keys of a detail log other values."""
    lines, found = [], set()
    for line in path.read_text().splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        found.add(entry["key"])
        entry["value"] = values.get(entry["key"], entry["value"])
        lines.append(f":::MLLOG {json.dumps(entry)}\n")
    assert set(values) <= found, path
    path.write_text("".join(lines))


def add_error(path):
    lines = path.read_text().splitlines(keepends=True)
    entry = json.loads(lines[-1].removeprefix(":::MLLOG "))
    entry |= {"key": "error_runtime", "value": "boom"}
    entry["metadata"]["is_error"] = True
    path.write_text("".join([f":::MLLOG {json.dumps(entry)}\n", *lines]))


def without_errors(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"is_error": true' not in line))


@pytest.fixture(scope="module")
def good(runs, tmp_path_factory):
    """The tree as ten minutes a run on all of COCO would have left it: only the logs differ."""
    tree = tmp_path_factory.mktemp("good")
    submit(runs, tree)
    for path in tree.rglob(DETAIL):
        without_errors(path)
        offline = "Offline" in path.parts
        edit_log(
            path,
            effective_min_duration_ms=600_000,
            effective_accuracy_sample_count=5000,
            effective_samples_per_query=24_576 if offline else 1,
        )
        if path.parent.name == "accuracy":
            continue
        score = "result_samples_per_second" if offline else "result_scheduled_samples_per_sec"
        edit_log(path, result_validity="VALID", **{score: 100.0})
        if not offline:
            edit_log(path, early_stopping_met=True)
        summary = path.with_name(SUMMARY)
        summary.write_text(summary.read_text().replace("is : INVALID", "is : VALID"))
    for path in tree.rglob("verify_performance.txt"):
        path.write_text("Verifying performance.\nTEST PASS\n")
    return tree


def errors(tree):
    return [finding for finding in check_submission(tree) if finding.error]


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


MODEL = f"{SYSTEM}/ssd-resnet34"
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


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_open_division_is_freer(runs, tmp_path):
    root, _ = submit(runs, tmp_path, "open")
    shutil.rmtree(root / "compliance")
    (root / "results" / MODEL / "Server" / "accuracy" / "accuracy.txt").write_text(
        "mAP=1.000%\nhash=" + 64 * "0" + "\n"
    )
    found = check_submission(tmp_path)
    assert not any(item.error for item in found if "accuracy.txt" in item.path.name)
    assert any("the target is 19.8" in item.message for item in found if not item.error)
    assert not any("compliance" in str(item.path) for item in found)
    assert any("600000" in item.message for item in found if item.error)  # 0.2 s is no run


@given(st.binary(max_size=30_000))
def test_truncation_keeps_both_ends(log):
    kept = truncated(log)
    assert len(kept) <= 10_240
    assert kept[:4096] == log[:4096] and kept[-4096:] == log[-4096:]
    assert kept == log or len(log) > 10_240


@given(
    st.dictionaries(
        st.sampled_from([*SYSTEM_FIELDS, "colour", "measurements"]),
        st.text(st.characters(codec="ascii", exclude_characters='"\\\x7f', min_codepoint=32))
        | st.integers(-5, 5)
        | st.booleans(),
        max_size=4,
    )
)
def test_descriptions_are_taken_as_written_or_refused(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("toml") / "system.toml"
    # JSON's strings, numbers and booleans are TOML's, too
    lines = [f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in values.items()]
    path.write_text("".join(lines))
    try:
        assert load_description(path).system == values
    except HarnessError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert not {"colour", "measurements", "submitter", "division"} & set(values)
        assert not any(isinstance(value, bool) for value in values.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"division": "half"}, "unknown division 'half'; choose of: open, closed"),
        ({"submitter": "a/b"}, "submitter 'a/b' is no folder name"),
        ({"submitter": ""}, "submitter '' is no folder name"),
    ],
)
def test_bad_names_are_refused(change, message, runs, tmp_path):
    arguments = {"submitter": "Acme", "division": "open", **change}
    with pytest.raises(HarnessError, match=re.escape(message)):
        write_submission(
            find_bases([runs / "logs"]),
            description=owner(tmp_path),
            output=tmp_path / "tree",
            **arguments,
        )
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "--output=taken"}, "commit '--output=taken' is none of git's"),
        ({"commit": "--remote=ssh://host/x"}, "is none of git's"),
        ({"commit": "HEAD"}, "is none of git's"),
        ({"engine": {"backend": "../../../fake"}}, "backend '../../../fake' is no folder name"),
        ({"engine": {"backend": "/tmp/fake"}}, "backend '/tmp/fake' is no folder name"),  # noqa: S108
        ({"engine": {}}, "backend '' is no folder name"),
    ],
)
@pytest.mark.parametrize("mode", ["PerformanceOnly", "AccuracyOnly"])
def test_a_result_that_is_not_ours_is_refused(change, message, mode, runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    path = next((tmp_path / "copy" / "logs").rglob(f"{mode}/result.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HarnessError, match=f"{mode}/result.json: .*{re.escape(message)}"):
        submit(tmp_path / "copy", tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "system.toml"])


def test_a_tree_is_not_written_over_another(runs, tmp_path):
    submit(runs, tmp_path)
    with pytest.raises(HarnessError, match="exists; remove it"):
        submit(runs, tmp_path)


def test_sources_are_those_of_the_runs_commit(runs, tmp_path):
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("needs a git checkout")
    shutil.copytree(runs, tmp_path / "copy")
    results = list((tmp_path / "copy" / "logs").rglob("result.json"))
    for commit, whole in ((head.stdout.strip(), True), (head.stdout.strip() + "-dirty", False)):
        for path in results:
            path.write_text(json.dumps({**json.loads(path.read_text()), "commit": commit}))
        shutil.rmtree(tmp_path / "closed", ignore_errors=True)
        root, notes = submit(tmp_path / "copy", tmp_path)
        code = root / "code" / "ssd-resnet34" / "fake"
        assert (code / "harness" / "results" / "run.py").exists() == whole
        assert not (code / "demo" / "data").exists()
        assert any("lacks the sources of commit" in note for note in notes) != whole
        assert whole or commit in (code / "README.md").read_text()


def test_a_scenario_is_given_once(runs, tmp_path):
    shutil.copytree(runs / "logs", tmp_path / "again")
    with pytest.raises(HarnessError, match="one run of Offline each"):
        write_submission(
            find_bases([runs / "logs", tmp_path / "again"]),
            submitter="Acme",
            division="open",
            description=owner(tmp_path),
            output=tmp_path,
        )


def test_a_missing_run_is_refused(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    accuracy = tmp_path / "copy" / "logs" / MODEL / "Server" / "AccuracyOnly"
    shutil.rmtree(accuracy)
    with pytest.raises(HarnessError, match=r"Server holds no AccuracyOnly run"):
        submit(tmp_path / "copy", tmp_path)


def harness(*arguments, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done


def test_commands(runs, good, tmp_path):
    system = tmp_path / "system.toml"
    system.write_text(OWNER)
    options = ["--submitter", "Acme", "--division", "closed", "--system", system]
    done = harness("submission", *options, "-o", tmp_path / "tree", runs / "logs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "tree" / "closed" / "Acme")
    done = harness("submission", "--check", tmp_path / "tree")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if "at least 600000" in line)
    assert line.startswith(f"error: {tmp_path / 'tree' / 'closed' / 'Acme' / 'results'}")
    done = harness("submission", "--check", good)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 errors, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submission", "--check", "nowhere"], "nowhere is no folder"),
        (["submission", "--check", "."], "holds no open/SUBMITTER or closed/SUBMITTER"),
        (["submission", "logs"], "give --submitter, -o and the log folders, or --check"),
        (["submission", "--check", ".", "logs"], "--check takes a submission tree"),
        (["compliance", "TEST02", "m.onnx", "--base", "."], "unknown test 'TEST02'; choose of"),
        (["compliance", "TEST01", "m.onnx", "--base", "."], "no result.json of a complete run"),
    ],
)
def test_user_errors_are_one_line(arguments, message, tmp_path):
    done = harness(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("harness: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_demo_is_not_the_benchmark(runs, tmp_path):
    (system,) = (runs / "logs").iterdir()
    shutil.copytree(system, tmp_path / "logs" / system.name)
    (folder,) = (tmp_path / "logs" / system.name).iterdir()
    folder.rename(folder.with_name("ssd-resnet34-demo"))
    with pytest.raises(HarnessError, match="ssd-resnet34-demo is not the benchmark"):
        submit(tmp_path, tmp_path)
    root, _ = submit(tmp_path, tmp_path, "open")
    assert root.is_dir()

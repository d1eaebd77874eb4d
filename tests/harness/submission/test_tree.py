"""The submission tree that runs become, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.results.accuracy import evaluate
from harness.submission.check import check_submission
from harness.submission.compliance import find_bases
from harness.submission.description import MEASUREMENT_FIELDS, SYSTEM_FIELDS, load_description
from harness.submission.tree import truncated, write_submission
from tests.support import ROOT
from tests.support.compliance_runs import SYSTEM
from tests.support.grey import harness
from tests.support.submissions import DETAIL, LOG, MODEL, OWNER, SUMMARY, owner, submit

TESTS = ("TEST01", "TEST04-A", "TEST04-B", "TEST05")


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


def test_the_calibration_tells_of_corrections(runs, tmp_path):
    """Where the manifest does: an ONNX file's on the top, a plan's among the file's metadata."""
    shutil.copytree(runs, tmp_path / "runs")
    (offline, server) = (
        tmp_path / "runs" / "logs" / SYSTEM / "ssd-resnet34" / scenario / "PerformanceOnly"
        for scenario in ("Offline", "Server")
    )
    for folder, said in (
        (offline, {"correction": "bias"}),
        (server, {"metadata": {"correction": "bias", "equalised_on": "64"}}),
    ):
        content = json.loads((folder / "result.json").read_text())
        content["engine"] = {**content["engine"], **said}
        (folder / "result.json").write_text(json.dumps(content))
    root, _ = submit(tmp_path / "runs", tmp_path)
    (tmp_path / "plain").mkdir()
    plain, _ = submit(runs, tmp_path / "plain")
    for scenario in ("Offline", "Server"):
        place = Path("measurements") / SYSTEM / "ssd-resnet34" / scenario / "calibration_process.md"
        assert "bias correction" in (root / place).read_text()
        assert "bias correction" not in (plain / place).read_text()
        assert ("equalised" in (root / place).read_text()) == (scenario == "Server")


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


def test_runs_of_another_detector_are_refused(runs, tmp_path):
    """Also those that lie in a folder of the one that trees are for."""
    shutil.copytree(runs, tmp_path / "runs")
    for path in tmp_path.glob("runs/logs/*/*/*/*/result.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "benchmark": "retinanet"}))
    for division in ("open", "closed"):
        with pytest.raises(
            HarnessError, match=r": runs of retinanet; .* v2\.0, and of ssd-resnet34 alone$"
        ):
            submit(tmp_path / "runs", tmp_path, division)
    assert not (tmp_path / "open").exists()


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
            annotations=lambda _: runs / "data" / "annotations.json",
            output=tmp_path / "tree",
            **arguments,
        )
    assert not (tmp_path / "tree").exists()


def test_a_figure_of_fewer_devices_is_not_submitted(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    path = next((tmp_path / "copy" / "logs").rglob("PerformanceOnly/result.json"))
    lost = {"lost_devices": ["cuda:1 (GPU-1)"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **lost}))
    with pytest.raises(HarnessError, match=r"PerformanceOnly: a figure of fewer.*1 \(GPU-1\) lost"):
        submit(tmp_path / "copy", tmp_path)
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


@pytest.mark.parametrize("value", [0.9, 0.0, None])
def test_the_mean_average_precision_is_that_of_the_log(value, runs, tmp_path):
    """Whose hash stands beside it in accuracy.txt; result.json is easily edited."""
    shutil.copytree(runs, tmp_path / "copy")
    path = tmp_path / "copy" / "logs" / MODEL / "Server" / "AccuracyOnly" / "result.json"
    result = json.loads(path.read_text())
    accuracy = None if value is None else {**result["accuracy"], "mAP": value}
    path.write_text(json.dumps({**result, "value": value, "accuracy": accuracy}))
    with pytest.raises(HarnessError, match=r"AccuracyOnly.* mAP"):
        submit(tmp_path / "copy", tmp_path)
    assert not (tmp_path / "closed" / "Acme").exists()


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
            annotations=lambda _: runs / "data" / "annotations.json",
            output=tmp_path,
        )


def test_a_missing_run_is_refused(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    accuracy = tmp_path / "copy" / "logs" / MODEL / "Server" / "AccuracyOnly"
    shutil.rmtree(accuracy)
    with pytest.raises(HarnessError, match=r"Server holds no AccuracyOnly run"):
        submit(tmp_path / "copy", tmp_path)


@pytest.mark.slow
def test_commands(runs, good, tmp_path):
    system = tmp_path / "system.toml"
    system.write_text(OWNER)
    known = tmp_path / "demo" / "data" / "annotations" / "instances_val.json"
    known.parent.mkdir(parents=True)
    shutil.copyfile(runs / "data" / "annotations.json", known)
    options = ["--submitter", "Acme", "--division", "closed", "--system", system]
    done = harness(tmp_path, "submission", *options, "-o", tmp_path / "tree", runs / "logs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "tree" / "closed" / "Acme")
    done = harness(ROOT, "submission", "--check", tmp_path / "tree")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if "at least 600000" in line)
    assert line.startswith(f"error: {tmp_path / 'tree' / 'closed' / 'Acme' / 'results'}")
    done = harness(ROOT, "submission", "--check", good)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 errors, ")


@pytest.mark.slow
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
    done = harness(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("harness: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_demo_is_not_the_benchmark(runs, tmp_path):
    (system,) = (runs / "logs").iterdir()
    shutil.copytree(system, tmp_path / "logs" / system.name)
    shutil.copytree(runs / "data", tmp_path / "data")
    (folder,) = (tmp_path / "logs" / system.name).iterdir()
    folder.rename(folder.with_name("ssd-resnet34-demo"))
    with pytest.raises(HarnessError, match="ssd-resnet34-demo is not the benchmark"):
        submit(tmp_path, tmp_path)
    root, _ = submit(tmp_path, tmp_path, "open")
    assert root.is_dir()

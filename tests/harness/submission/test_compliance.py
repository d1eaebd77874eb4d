"""The compliance tests: what LoadGen is told, the verdicts, and cheats that must not pass."""

from __future__ import annotations

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.loadgen.log import ACCURACY, DETAIL, DetailLog, read_detail
from harness.results.report import find_results
from harness.submission import compliance
from harness.submission.compliance import check_compliance, find_bases
from harness.submission.rules import verify_performance, verify_same_sample
from tests.support.compliance_runs import TOTAL, CheatingEngine, base_runs, benchmark
from tests.support.grey import BOX, grey_detector, harness

KEYS = {
    "Offline": "result_samples_per_second",
    "Server": "result_scheduled_samples_per_sec",
    "SingleStream": "result_90.00_percentile_latency_ns",
    "MultiStream": "result_99.00_percentile_per_query_latency_ns",
}


def log(scenario, value, verdict="VALID", errors=()):
    return DetailLog({KEYS[scenario]: value, "result_validity": verdict}, errors)


@pytest.mark.parametrize(
    ("test", "scenario", "reference", "tested", "passed"),
    [
        ("TEST01", "Offline", 100.0, 91.0, True),
        ("TEST01", "Offline", 100.0, 89.0, False),
        ("TEST01", "Offline", 100.0, 111.0, False),  # faster is suspicious, too
        ("TEST01", "Server", 100.0, 109.0, True),
        ("TEST01", "SingleStream", 5e6, 5.4e6, True),
        ("TEST01", "SingleStream", 5e6, 5.6e6, False),
        ("TEST01", "SingleStream", 2e5, 2.3e5, True),  # up to 0.2 ms: 20 %
        ("TEST01", "SingleStream", 2e5, 2.5e5, False),
        ("TEST01", "MultiStream", 1.6e6, 1.9e6, True),  # up to 1.6 ms: 20 %
        ("TEST05", "MultiStream", 1.6e6, 1.9e6, False),
        ("TEST05", "Offline", 100.0, 96.0, True),
        ("TEST05", "Offline", 100.0, 94.0, False),
        ("TEST05", "SingleStream", 1e5, 1.15e5, True),
        ("TEST05", "Server", 100.0, 106.0, False),
    ],
)
def test_performance_tolerances(test, scenario, reference, tested, passed):
    check = verify_performance(test, scenario, log(scenario, reference), log(scenario, tested))
    assert check.passed == passed
    text = check.files["verify_performance.txt"].splitlines()
    assert text[0] == "Verifying performance."
    assert float(text[1].removeprefix("reference score = ")) == reference
    assert float(text[2].removeprefix("test score = ")) == tested
    assert text[3] == ("TEST PASS" if passed else "TEST FAIL: Test score invalid")


@pytest.mark.parametrize(
    ("reference", "tested", "words"),
    [("INVALID", "VALID", "Reference results"), ("VALID", "INVALID", "Test results")],
)
def test_an_invalid_run_fails(reference, tested, words):
    check = verify_performance(
        "TEST01", "Offline", log("Offline", 9.0, reference), log("Offline", 9.0, tested, ("e",))
    )
    text = check.files["verify_performance.txt"]
    assert not check.passed
    assert f"TEST FAIL: {words} are invalid\n" in text and "TEST PASS" not in text
    assert "WARNING: 1 ERROR reported in test results\n" in text


@given(
    scenario=st.sampled_from(sorted(KEYS)),
    unique=st.floats(2e6, 1e9),
    ratio=st.floats(0.2, 5).filter(lambda ratio: min(abs(ratio - 0.9), abs(ratio - 1.1)) > 1e-6),
)
def test_the_same_sample_must_not_be_faster(scenario, unique, ratio):
    """`ratio` is the speed of TEST04-B over that of TEST04-A, as the score of each scenario."""
    latency = scenario in ("SingleStream", "MultiStream")
    check = verify_same_sample(scenario, log(scenario, unique), log(scenario, unique * ratio))
    assert check.passed == (ratio > 0.9 if latency else ratio < 1.1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Base runs of the stand-in."""
    root = tmp_path_factory.mktemp("base")
    bench = benchmark(root / "data", CheatingEngine(seconds=0.002))
    base_runs(bench, root / "logs", "SingleStream", target_latency_ms=1.0)
    base_runs(bench, root / "logs", "Offline", batch_size=8, min_query_count=300)
    base_runs(bench, root / "logs", "MultiStream", target_latency_ms=1.0)
    return root


@pytest.fixture
def place(runs, tmp_path):
    """A copy of them, by scenario."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    return {base.scenario: base for base in find_bases([tmp_path / "logs"])}


@pytest.fixture
def grey(tmp_path):
    """A working directory with six grey images and a model that detects each."""
    place = tmp_path / "place"
    images = place / "build" / "data" / "coco" / "val2017"
    images.mkdir(parents=True)
    entries, annotations = [], []
    for index, grey in enumerate((10, 40, 20, 50, 30, 60)):
        name = f"{index:012d}.png"
        cv2.imwrite(str(images / name), np.full((20, 40, 3), grey, np.uint8))
        entries.append({"id": index, "file_name": name, "height": 20, "width": 40})
        top, left, bottom, right = BOX
        box = [left * 40, top * 20, (right - left) * 40, (bottom - top) * 20]
        annotations.append(
            {
                "id": index + 1,
                "image_id": index,
                "category_id": grey // 10,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    categories = [{"id": number, "name": str(number)} for number in range(1, 7)]
    folder = images.parent / "annotations"
    folder.mkdir()
    (folder / "instances_val2017.json").write_text(
        json.dumps({"images": entries, "annotations": annotations, "categories": categories})
    )
    (place / "data_maps" / "coco").mkdir(parents=True)
    names = "".join(f"{entry['file_name']}\n" for entry in entries)
    (place / "data_maps" / "coco" / "val_map.txt").write_text(names)
    grey_detector(place / "grey.onnx")
    return place


def cheater(tmp_path, **traits):
    engine = CheatingEngine(seconds=0.002)
    for name, value in traits.items():
        setattr(engine, name, value)
    return benchmark(tmp_path / "data", engine)


@pytest.mark.parametrize("scenario", ["SingleStream", "Offline"])
def test_honest_answers_pass(scenario, place, tmp_path):
    verdict = check_compliance(cheater(tmp_path), place[scenario], "TEST01")
    folder = place[scenario].directory / "TEST01"
    text = (folder / "verify_accuracy.txt").read_text()
    logged = len(json.loads((folder / ACCURACY).read_text()))
    assert logged > 20
    assert f"num_acc_log_entries = {TOTAL}\n" in text
    assert f"num_perf_log_entries = {logged}\n" in text
    assert f"num_perf_log_qsl_idx_match = {logged}\n" in text
    assert "num_perf_log_data_mismatch = 0\n" in text
    assert text.endswith("TEST PASS\n")
    assert not (folder / "baseline_accuracy.txt").exists()
    # whether the speed agrees is the machine's affair, but the verdict must say what the file says
    assert verdict.passed == ("TEST PASS" in (folder / "verify_performance.txt").read_text())
    assert json.loads((folder / "compliance.json").read_text())["passed"] == verdict.passed
    values = read_detail(folder / DETAIL).values
    assert values["effective_test_mode"] == "PerformanceOnly"
    assert values["effective_accuracy_log_rng_seed"] == 720381539243781796
    assert values["effective_accuracy_log_sampling_target"] == 256


def test_other_answers_in_performance_mode_fail(place, tmp_path):
    verdict = check_compliance(cheater(tmp_path, lie="labels"), place["SingleStream"], "TEST01")
    folder = place["SingleStream"].directory / "TEST01"
    assert not verdict.passed
    assert (folder / "verify_accuracy.txt").read_text().endswith("TEST FAIL\n")
    assert (folder / "baseline_accuracy.txt").read_text() == "mAP=100.000%\n"
    assert (folder / "compliance_accuracy.txt").read_text() == "mAP=0.000%\n"


def test_answers_that_differ_in_the_last_bits_are_compared_by_map(place, tmp_path):
    bench = cheater(tmp_path, lie="last bits")
    verdict = check_compliance(bench, place["SingleStream"], "TEST01")
    folder = place["SingleStream"].directory / "TEST01"
    assert (folder / "verify_accuracy.txt").read_text().endswith("TEST FAIL\n")
    assert verdict.figures["mAP"] == pytest.approx(1.0)
    assert verdict.passed == ("TEST PASS" in (folder / "verify_performance.txt").read_text())
    assert any("not the same bytes" in remark for remark in verdict.remarks)


def test_one_wrong_answer_among_right_ones_counts(place, tmp_path):
    """v2.0's scripts look at the first byte, and at the first answer of an image."""
    from harness.submission.rules import verify_accuracy

    bench = cheater(tmp_path)
    base = place["SingleStream"].directory / "AccuracyOnly" / ACCURACY
    right = [item for item in json.loads(base.read_text()) if len(item["data"]) == 56]
    wrong = [{**item, "data": item["data"][:48] + "0000A042"} for item in right]  # label 80.0
    assert all(a["data"] != b["data"] for a, b in zip(right, wrong, strict=True))
    audited = tmp_path / "audited.json"
    audited.write_text(json.dumps(right + wrong))
    check = verify_accuracy(base, audited, bench.dataset.annotations, bench.source.files)
    assert not check.passed
    assert f"num_perf_log_data_mismatch = {len(wrong)}\n" in check.files["verify_accuracy.txt"]


class FromZero(CheatingEngine):
    """The same detections, whose labels count from 0."""

    def infer(self, images):
        detections, counts = super().infer(images)
        detections[..., 6] -= detections[..., 6] > 0
        return detections, counts


@pytest.mark.parametrize(("first", "least", "most"), [(0, 0.999, 1.001), (1, 0.0, 0.8)])
def test_labels_from_0_are_compared_by_map(first, least, most, tmp_path):
    """TEST01 takes them as the engine's manifest says; else each is the class before it."""
    engine = FromZero(seconds=0.002)
    engine.manifest = {"backend": "fake", "first_label": first}
    bench = benchmark(tmp_path / "data", engine)
    folder = base_runs(bench, tmp_path / "logs", "SingleStream", target_latency_ms=1.0)
    (base,) = find_bases([folder])
    engine.lie = "last bits"
    verdict = check_compliance(bench, base, "TEST01")
    assert verdict.figures["different"] > 20
    assert least < verdict.figures["baseline mAP"] < most
    assert least < verdict.figures["mAP"] < most


def test_a_test_that_the_round_has_not_is_refused(place, tmp_path):
    for name in ("PerformanceOnly", "AccuracyOnly"):
        path = place["Offline"].directory / name / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "benchmark": "retinanet"}))
    base = ("--base", place["Offline"].directory)
    done = harness(tmp_path, "compliance", "TEST04", "none.onnx", *base)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("Offline: round v5.1 has no TEST04 for retinanet, but TEST01")
    assert not list(place["Offline"].directory.glob("TEST04*"))


@pytest.mark.parametrize("scenario", ["SingleStream", "MultiStream", "Offline"])
def test_a_cache_of_images_fails_test04(scenario, place, tmp_path):
    bench = cheater(tmp_path, remembers=True)
    verdict = check_compliance(bench, place[scenario], "TEST04")
    folder = place[scenario].directory
    assert not verdict.passed
    text = (folder / "TEST04-A" / "verify_performance.txt").read_text()
    assert text.endswith("TEST FAIL: Test score invalid\n")
    assert not list((folder / "TEST04-B").glob("verify*"))
    unique, same = (read_detail(folder / f"TEST04-{x}" / DETAIL).values for x in "AB")
    assert unique["effective_performance_issue_unique"] is True
    assert unique["effective_performance_issue_same"] is False
    assert same["effective_performance_issue_unique"] is False
    assert same["effective_performance_issue_same"] is True
    assert same["effective_performance_issue_same_index"] == 3


def test_test05_uses_other_seeds(place, tmp_path):
    base = place["SingleStream"]
    check_compliance(cheater(tmp_path), base, "TEST05")
    before = read_detail(base.directory / "PerformanceOnly" / DETAIL).values
    after = read_detail(base.directory / "TEST05" / DETAIL).values
    for name in ("qsl", "sample_index", "schedule"):
        assert before[f"effective_{name}_rng_seed"] != after[f"effective_{name}_rng_seed"]
    assert before["effective_min_duration_ms"] == after["effective_min_duration_ms"]


def test_test04_can_have_more_samples(place, tmp_path):
    bench = cheater(tmp_path)
    base = place["SingleStream"]
    check_compliance(bench, base, "TEST04", samples=70)
    values = read_detail(base.directory / "TEST04-A" / DETAIL).values
    assert values["result_query_count"] == 70
    with pytest.raises(HarnessError, match="TEST01 runs with the samples of the base run"):
        check_compliance(bench, base, "TEST01", samples=70)


def test_another_engine_is_refused(place, tmp_path):
    bench = cheater(tmp_path, manifest={"backend": "fake", "onnx_sha256": "other"})
    with pytest.raises(HarnessError, match=r"another engine: onnx_sha256 was None and is 'other'"):
        check_compliance(bench, place["Offline"], "TEST01")


def test_other_samples_are_refused(place, tmp_path):
    path = place["Offline"].directory / "PerformanceOnly" / "samples.txt"
    path.write_text("another.jpg\n")
    with pytest.raises(HarnessError, match="other samples"):
        check_compliance(cheater(tmp_path), place["Offline"], "TEST05")


def test_a_missing_base_run_is_named(place, tmp_path):
    shutil.rmtree(place["Offline"].directory / "AccuracyOnly")
    (base,) = find_bases([place["Offline"].directory])
    with pytest.raises(HarnessError, match="holds no AccuracyOnly run; make it with"):
        check_compliance(cheater(tmp_path), base, "TEST01")


def test_a_test_is_not_run_over_another(place, tmp_path):
    (place["Offline"].directory / "TEST05").mkdir()
    with pytest.raises(HarnessError, match="TEST05 exists; remove it"):
        check_compliance(cheater(tmp_path), place["Offline"], "TEST05")


@pytest.mark.slow
def test_command(grey, tmp_path):
    """From images to verdict files, with a model in ONNX Runtime."""
    model, data = "grey.onnx", ("--dataset", "coco")
    assert harness(grey, "preprocess", model, *data, "--val_only").returncode == 0
    modes = "AccuracyOnly,PerformanceOnly"
    short = ("--min-duration", "0.3", "--target-qps", "1000", "--min-queries", "300")
    log = ("--log-dir", tmp_path / "logs", "--system", "box")
    done = harness(grey, "run", model, *data, "--test_mode", modes, *short, *log)
    assert done.returncode == 0, done.stderr
    done = harness(grey, "compliance", "test01", model, "--base", tmp_path / "logs")
    folder = tmp_path / "logs" / "box" / "ssd-resnet34" / "Offline" / "TEST01"
    assert "TEST PASS" in (folder / "verify_accuracy.txt").read_text()
    passed = "TEST PASS" in (folder / "verify_performance.txt").read_text()
    assert done.returncode == (0 if passed else 1), done.stderr
    assert done.stdout.startswith(f"Offline TEST01: {'PASS' if passed else 'FAIL'}\n")
    assert str(folder / "verify_accuracy.txt") in done.stdout
    results = find_results([tmp_path / "logs"])
    assert {result.mode for _, result in results} == {*modes.split(","), "TEST01"}


def compared(place, tmp_path, then, now):
    folder, result = place["SingleStream"].run("PerformanceOnly")
    bench = cheater(tmp_path, manifest={"backend": "fake", **now})
    result = dataclasses.replace(result, engine={**result.engine, **then})
    compliance._check_same(bench, folder, result)


def test_what_a_result_from_before_does_not_say_is_not_compared(place, tmp_path):
    """Its manifest has neither keep_top_k nor outputs, which an engine's has today."""
    says = {"keep_top_k": 100, "outputs": {"detections": [100, 7], "num_detections": []}}
    compared(place, tmp_path, {}, says)
    with pytest.raises(HarnessError, match="another engine: keep_top_k was 200 and is 100"):
        compared(place, tmp_path, {**says, "keep_top_k": 200}, says)
    with pytest.raises(HarnessError, match="another engine: first_label was 1 and is 0"):
        compared(place, tmp_path, says, {**says, "first_label": 0})


def test_runs_of_two_commands_go_together(place, tmp_path):
    """cuDNN prepares no larger batches than the scenarios of one command need."""
    then = {"max_batch": 8, "batch_sizes": [1, 2, 8], "kernels": {"conv": "wide"}}
    now = {"max_batch": 1, "batch_sizes": [1], "kernels": {"conv": "narrow"}}
    compared(place, tmp_path, then, now)
    with pytest.raises(HarnessError, match="another engine: version was 9 and is 10"):
        compared(place, tmp_path, {**then, "version": 9}, {**now, "version": 10})


def test_which_gpus_of_a_model_ran_is_not_compared(place, tmp_path):
    then = {"devices": ["cuda:0"], "gpus": [{"uuid": "GPU-0", "manifest": {}}]}
    now = {"device": "cuda:0", "running_on": {"uuid": "GPU-1"}}
    compared(place, tmp_path, then, now)
    with pytest.raises(HarnessError, match="another engine: devices was"):
        compared(place, tmp_path, {**then, "devices": ["cuda:0", "cuda:1"]}, now)


def test_a_base_run_that_lost_devices_is_refused(place, tmp_path):
    path = place["Offline"].directory / "PerformanceOnly" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lost_devices": ["cuda:1 (G)"]}))
    (base,) = find_bases([place["Offline"].directory])
    with pytest.raises(HarnessError, match=r"PerformanceOnly: cuda:1 \(G\) lost in it; remove it"):
        check_compliance(cheater(tmp_path), base, "TEST05")
    assert not (place["Offline"].directory / "TEST05").exists()

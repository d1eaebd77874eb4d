"""The harness command from image files to the table, with a model whose mAP is known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT, attempt
from tests.support.grey import GREYS, grey_dataset, grey_detector, harness

pytestmark = pytest.mark.slow  # commands in processes of their own


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a data set as `harness download` would leave it, and a model."""
    place = tmp_path_factory.mktemp("place")
    coco = place / "build" / "data" / "coco"
    names = grey_dataset(coco / "val2017", coco / "annotations" / "instances_val2017.json")
    maps = place / "data_maps" / "coco"
    maps.mkdir(parents=True)
    # not the order of the annotations: the position in the map is what counts
    (maps / "val_map.txt").write_text("\n".join(names[::-1]) + "\n")
    grey_detector(place / "grey.onnx")
    return place


@pytest.fixture(scope="module")
def preprocessed(place):
    done = harness(place, "preprocess", "grey.onnx", "--val_only", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert f"{len(GREYS)} images in build/preprocessed_data/coco-val/float32_8x8" in done.stdout
    return place


RUN = ["run", "grey.onnx", "--min-duration", "0.2", "--min-queries", "20", "--threads", "1"]


@pytest.fixture(scope="module")
def logs(preprocessed):
    """A run in two scenarios and both modes."""
    done = harness(
        preprocessed,
        *RUN,
        *("--scenarios", "Offline,singlestream"),
        *("--test_mode", "AccuracyOnly,PerformanceOnly"),
        *("--batch", "4", "--pictures", "2", "--log-dir", "logs", "--system", "box"),
    )
    assert done.returncode == 0, done.stderr
    logs = preprocessed / "logs"
    (logs / "stdout.txt").write_text(done.stdout)
    return logs


def test_run_finds_the_known_accuracy(logs):
    folder = logs / "box" / "ssd-resnet34"
    for scenario in ("Offline", "SingleStream"):
        result = json.loads((folder / scenario / "AccuracyOnly" / "result.json").read_text())
        assert result["value"] == pytest.approx(1.0)
        assert result["accuracy"]["AP50"] == pytest.approx(1.0)
        assert result["accuracy"]["images_seen"] == len(GREYS)
        assert result["engine"]["backend"] == "onnxruntime"
        result = json.loads((folder / scenario / "PerformanceOnly" / "result.json").read_text())
        assert result["value"] > 0
        assert result["settings"]["min_duration_ms"] == 200
        conf = folder / scenario / "PerformanceOnly" / "user.conf"
        assert f"ssd-resnet34.{scenario}.min_query_count = 20\n" in conf.read_text()
    pictures = list((folder / "Offline" / "AccuracyOnly" / "pictures").iterdir())
    assert len(pictures) == 3  # two, and both in one


def test_the_run_says_how_it_was_made(logs):
    folder = logs / "box" / "ssd-resnet34" / "Offline" / "PerformanceOnly"
    result = json.loads((folder / "result.json").read_text())
    assert result["command"].startswith("python -m harness run grey.onnx --min-duration 0.2 ")
    assert result["command"].endswith(" --log-dir logs --system box")
    assert result["engine"]["devices"] == ["cpu"]
    assert result["settings"]["streams"] == 1


def test_streams_find_the_same_detections(logs, preprocessed):
    done = harness(
        preprocessed,
        *RUN,
        *("--test_mode", "AccuracyOnly", "--batch", "4", "--streams", "2"),
        *("--log-dir", "streams", "--system", "box"),
    )
    assert done.returncode == 0, done.stderr
    run = Path("box", "ssd-resnet34", "Offline", "AccuracyOnly")
    result = json.loads((preprocessed / "streams" / run / "result.json").read_text())
    assert result["settings"]["streams"] == 2

    def rows(folder):
        log = json.loads((folder / run / "mlperf_log_accuracy.json").read_text())
        return {entry["qsl_idx"]: entry["data"] for entry in log}

    assert rows(preprocessed / "streams") == rows(logs)


def test_run_prints_one_table(logs):
    text = (logs / "stdout.txt").read_text()
    for word in ("mAP", "AP50", "samples/s", "p50 ms", "p99 ms", "1.0000", "SingleStream"):
        assert word in text
    for mode in ("AccuracyOnly", "PerformanceOnly"):
        assert f"logs/box/ssd-resnet34/Offline/{mode}" in text
    assert "logs/box/ssd-resnet34/Offline/AccuracyOnly/pictures" in text


def test_report_prints_it_again(logs, preprocessed):
    done = harness(preprocessed, "report", "logs")
    assert done.returncode == 0, done.stderr
    assert sorted([*done.stdout.splitlines(), "page in logs/report.html"]) == sorted(
        (logs / "stdout.txt").read_text().splitlines()
    )
    assert "grey 90" in (logs / "report.html").read_text()  # a class's name
    done = harness(preprocessed, "report", "logs", "--json")
    results = json.loads(done.stdout)
    assert [(item["scenario"], item["mode"]) for item in results] == [
        ("Offline", "AccuracyOnly"),
        ("Offline", "PerformanceOnly"),
        ("SingleStream", "AccuracyOnly"),
        ("SingleStream", "PerformanceOnly"),
    ]


def test_a_configuration_of_tune_by_its_path(preprocessed):
    """Of `harness tune -o`: engine, threads, settings, name are its own, options go before."""
    (preprocessed / "mine.toml").write_text("""
        [system]
        benchmark = "ssd-resnet34"
        cpu = "any"
        [default]
        engine = "onnxruntime"
        device = "cpu"
        threads = 1
        min_duration_ms = 200
        min_query_count = 20
        [default.Offline]
        batch_size = 3
        [default.Server]
        target_qps = 100.0
        batch_size = 2
        """)
    arguments = ["run", "grey.onnx", "--config", "mine.toml"]
    done = harness(
        preprocessed,
        *(*arguments, "--scenarios", "all", "--log-dir", "tuned", "--min_duration", "0.1"),
    )
    assert done.returncode == 0, done.stderr
    folder = preprocessed / "tuned" / "mine" / "ssd-resnet34"
    found = {path.name: path for path in folder.iterdir()}
    assert set(found) == {"Offline", "Server", "SingleStream", "MultiStream"}
    for name, batch in (("Offline", 3), ("Server", 2)):
        result = json.loads((found[name] / "PerformanceOnly" / "result.json").read_text())
        assert result["engine"]["threads"] == 1
        assert result["settings"]["batch_size"] == batch
        assert result["settings"]["min_duration_ms"] == 100
    (preprocessed / "wrong.toml").write_text((preprocessed / "mine.toml").read_text() + "x = 1")
    done = harness(preprocessed, "run", "grey.onnx", "--config", "wrong.toml")
    assert done.returncode == 2 and "wrong.toml [default]: Server.x: unknown" in done.stderr


def test_resume_adds_what_is_missing(logs, preprocessed):
    before = {path: path.read_bytes() for path in logs.rglob("result.json")}
    arguments = [*RUN, "--batch", "4", "--log-dir", "logs", "--system", "box", "--resume"]
    modes = ["--test_mode", "AccuracyOnly,PerformanceOnly"]
    done = harness(preprocessed, *arguments, *modes, "--scenarios", "Offline,MultiStream")
    assert done.returncode == 0, done.stderr
    after = {path: path.read_bytes() for path in logs.rglob("result.json")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    done = harness(preprocessed, *arguments, *modes, "--min-queries", "30")
    assert done.returncode == 2
    assert "is of another test: min_query_count was 20 and is 30 now" in done.stderr


def test_two_runs_are_compared(logs, preprocessed):
    done = harness(preprocessed, "report", "--compare", "logs", "logs")
    assert done.returncode == 0, done.stderr
    assert "Offline AccuracyOnly" in done.stdout
    assert "│ AP50" in done.stdout


def test_accuracy_of_a_log(logs, preprocessed):
    log = logs / "box" / "ssd-resnet34" / "Offline" / "AccuracyOnly" / "mlperf_log_accuracy.json"
    done = harness(preprocessed, "accuracy", log, "--dataset", "coco")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "mAP=100.000%"
    annotations = preprocessed / "build" / "data" / "coco" / "annotations"
    order = ["--annotations", annotations / "instances_val2017.json"]
    done = harness(preprocessed, "accuracy", log, *order)  # samples.txt lies beside the log
    assert done.stdout.splitlines()[-1] == "mAP=100.000%"
    # Elsewhere the annotations tell the order: the reverse of the map's, so all labels are wrong.
    foreign = preprocessed / "mlperf_log_accuracy.json"
    foreign.write_bytes(log.read_bytes())
    done = harness(preprocessed, "accuracy", foreign, *order)
    assert done.stdout.splitlines()[-1] == "mAP=0.000%"


def test_a_skipped_image_is_not_forgotten(preprocessed):
    """Sample numbers shift when an image is left out; names must not."""
    images = preprocessed / "build" / "data" / "coco" / "val2017"
    bad = images / "000000000002.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:30])
    arguments = ["--val_only", "--workers", "1", "--preprocessed", "five"]
    done = harness(preprocessed, "preprocess", "grey.onnx", *arguments)
    assert done.returncode == 2 and bad.name in done.stderr
    done = harness(preprocessed, "preprocess", "grey.onnx", *arguments, "--skip-bad")
    assert done.returncode == 0, done.stderr
    bad.write_bytes(content)
    done = harness(
        preprocessed,
        *(*RUN, "--preprocessed", "five", "--test_mode", "AccuracyOnly", "--log-dir", "five_logs"),
    )
    assert done.returncode == 0, done.stderr
    assert "1.0000" in done.stdout
    assert "holds 5 of the 6 images of the map" in done.stdout
    (log,) = (preprocessed / "five_logs").rglob("mlperf_log_accuracy.json")
    done = harness(preprocessed, "accuracy", log, "--dataset", "coco")
    assert done.stdout.splitlines()[-1] == "mAP=100.000%"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so(preprocessed, number):
    folder = f"interrupted_{number.name}"
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "run", "grey.onnx", "--log-dir", folder],
        cwd=preprocessed,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list((preprocessed / folder).rglob("mlperf_log_detail.txt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "harness: error: Offline PerformanceOnly: interrupted" in stderr.splitlines()[-1]
    assert stdout == ""
    assert not list((preprocessed / folder).rglob("result.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.onnx"], "none.onnx: no such model file"),
        (["run", "grey.onnx", "--scenarios", "Offline,Sever"], "unknown scenario 'Sever'"),
        (["run", "grey.onnx", "--test_mode", "Accuracy"], "unknown test mode 'Accuracy'"),
        (["run", "grey.onnx", "--engine", "trt"], "unknown engine 'trt'"),
        (["run", "grey.onnx", "--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["run", "grey.onnx", "--preprocessed", "nowhere"], "nowhere"),
        (
            ["run", "grey.onnx", "--batch", "0"],
            "Offline.batch_size: greater than 0 expected, not 0",
        ),
        (["run", "grey.onnx", "--config", "none.toml"], "none.toml"),
        (["run", "grey.onnx", "--streams", "0"], "Offline.streams: greater than 0 expected, not 0"),
        (["run", "grey.onnx", "--devices", "0,x"], "--devices '0,x': numbers of GPUs expected"),
        (["run", "grey.onnx", "--device", "cpu", "--devices", "0"], "but the device is cpu"),
        (["run", "grey.onnx", "--pictures", "2"], "add --test_mode AccuracyOnly"),
        (["run", "grey.onnx", "--resume"], "name it, --log-dir"),
        (["run", "none.onnx", "--log-dir", "logs", "--system", "box"], "exists; choose another"),
        (
            ["report", "logs", "--compare"],
            "--compare takes two runs, logs holds 1: name another, too",
        ),
        (["report", "logs", "--csv", "--json"], "give one of --json, --csv"),
        (["accuracy", "none.json"], "give either --dataset or --annotations"),
        (["report", "."], "no result.json"),
    ],
)
def test_user_errors_are_one_line(arguments, message, preprocessed, logs, tmp_path):
    if arguments == ["report", "."]:
        arguments = ["report", tmp_path]
    done = harness(preprocessed, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("harness: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_bench_writes_its_figures(preprocessed):
    done = attempt(
        *("-m", "harness.bench", "harness", "grey.onnx", "-o", "docs/bench.json"),
        *("--dataset", "coco", "--image-size", "32", "--rounds", "1", "--seconds", "0.1"),
        cwd=preprocessed,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((preprocessed / "docs" / "bench.json").read_text())
    assert document["command"].startswith("python -m harness.bench harness grey.onnx -o ")
    assert document["command"].endswith("--seconds 0.1")
    efficiency = document["efficiency"]
    assert efficiency["efficiency"] == pytest.approx(
        efficiency["offline_samples_per_second"][0] / efficiency["loop_samples_per_second"][0]
    )
    assert 0 < efficiency["share_inside_engine"][0] <= 1
    assert document["null_server"]["median_p99_ms"] > 0
    for scenario, batch in (("Offline", 64), ("Server", 1)):
        overhead = document["overhead"][scenario]
        assert overhead["batch"] == batch
        assert overhead["ratio"] == pytest.approx(
            overhead["samples_per_second"][0] / overhead["bare_samples_per_second"][0]
        )
    assert document["preprocessing"]["images"] == len(GREYS)


def test_help_needs_no_heavy_module(preprocessed):
    code = (
        "import sys, harness.cli.main\n"
        "heavy = {'torch', 'onnxruntime', 'cv2', 'mlperf_loadgen', 'pycocotools', 'rich.table'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    done = attempt("-c", code)
    assert done.stderr.strip() == ""
    assert "preprocess" in harness(preprocessed, "--help").stdout

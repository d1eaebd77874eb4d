"""The default keeps the accuracy of the shipped demo set."""

from __future__ import annotations

import json

from tests.support import command


def test_int8_keeps_the_accuracy_of_the_demo_model(demo_int8, demo_result, tmp_path) -> None:
    """FP32 and INT8, by default, through export, calibration, LoadGen and COCO mAP."""
    build = ["--dataset", "demo", "--build-dir", tmp_path]
    command("harness", "preprocess", demo_int8, *build, "--val_only")
    logs = tmp_path / "logs"
    command("harness", "run", demo_int8, *build, "--test_mode", "AccuracyOnly", "--log-dir", logs)
    (result,) = logs.rglob("result.json")
    fp32, int8 = (json.loads(path.read_text())["value"] for path in (demo_result, result))
    assert fp32 > 0.5
    assert int8 >= 0.99 * fp32

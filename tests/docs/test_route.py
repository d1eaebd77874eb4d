"""The whole route with the shipped checkpoint, by the commands that users type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

CHECKPOINT = ROOT / "demo" / "ssd-resnet34-demo.safetensors"


@pytest.fixture(scope="module")
def route(tmp_path_factory) -> Path:
    """Export, surgery, preprocessing and an accuracy run; returns the folder of the results."""
    folder = tmp_path_factory.mktemp("route")
    model, surgered = folder / "demo.onnx", folder / "demo.nms.onnx"
    scenario = ["--scenarios", "Offline", "--test_mode", "AccuracyOnly", "--pictures", "2"]
    for command in (
        ["export", "--weights", CHECKPOINT, "-o", model],
        ["graph_surgery", "nms", model, surgered],
        ["harness", "preprocess", surgered, "--dataset", "demo", "--build-dir", folder],
        ["harness", "run", surgered, "--dataset", "demo", "--build-dir", folder, *scenario],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
    return folder


def test_demo_checkpoint_detects_what_pytorch_detects(route):
    """MAP through ONNX, surgery, ONNX Runtime, LoadGen and its log is that of plain PyTorch."""
    import torch

    from demo.evaluate import DATA, evaluate
    from export.checkpoint import infer_config, load_model, read_checkpoint

    (path,) = route.glob("logs/*/*/ssd-resnet34/Offline/AccuracyOnly/result.json")
    result = json.loads(path.read_text())
    weights = read_checkpoint(CHECKPOINT)
    model = load_model(weights, infer_config(weights))
    expected = evaluate(model, DATA, torch.device("cpu"))
    assert expected["mAP"] >= 0.40
    assert result["accuracy"]["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)
    assert result["accuracy"]["AP50"] == pytest.approx(expected["AP50"], abs=1e-3)
    assert result["accuracy"]["images_seen"] == result["accuracy"]["images_total"] >= 96
    assert len(list((path.parent / "pictures").iterdir())) >= 2


def test_shipped_files_fit_in_a_small_repository():
    shipped = [
        p for p in (ROOT / "demo").rglob("*") if p.suffix in {".jpg", ".npz", ".safetensors"}
    ]
    assert sum(p.stat().st_size for p in shipped) <= 12 * 2**20

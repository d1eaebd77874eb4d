"""The whole route with the shipped checkpoints, by the commands that users type."""

import json

import pytest

from harness.results.report import find_results
from tests.support import ROOT, command

CHECKPOINT = ROOT / "demo" / "ssd-resnet34-demo.safetensors"
RETINANET = ROOT / "demo" / "retinanet-demo.safetensors"


def in_pytorch(checkpoint):
    """What the checkpoint's mAP is without any of this."""
    import torch

    from demo.evaluate import DATA, evaluate
    from export.checkpoint import infer_config, load_model, read_checkpoint

    weights = read_checkpoint(checkpoint)
    return evaluate(load_model(weights, infer_config(weights)), DATA, torch.device("cpu"))


def test_demo_checkpoint_detects_what_pytorch_detects(demo_result):
    """MAP through ONNX, surgery, ONNX Runtime, LoadGen and its log is that of plain PyTorch."""
    result = json.loads(demo_result.read_text())
    expected = in_pytorch(CHECKPOINT)
    assert expected["mAP"] >= 0.40
    assert result["accuracy"]["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)
    assert result["accuracy"]["AP50"] == pytest.approx(expected["AP50"], abs=1e-3)
    assert result["accuracy"]["images_seen"] == result["accuracy"]["images_total"] >= 96
    assert len(list((demo_result.parent / "pictures").iterdir())) >= 2


def test_retinanet_keeps_its_map(tmp_path):
    """FP32 in ONNX Runtime has PyTorch's mAP, INT8 98 % of it."""
    scenario = ["--scenarios=Offline", "--test_mode=AccuracyOnly"]
    command(
        *("harness", "make", "run", "--benchmarks=retinanet-demo", *scenario),
        BUILD_DIR=str(tmp_path),
    )
    ((_, int8),) = find_results([tmp_path / "logs"])
    model = tmp_path / "onnx" / "retinanet-demo.nms.onnx"
    command("harness", "preprocess", model, "--dataset=demo", "--val_only", BUILD_DIR=str(tmp_path))
    command(
        *("harness", "run", model, "--dataset=demo", *scenario),
        *("--log-dir", tmp_path / "float"),
        BUILD_DIR=str(tmp_path),
    )
    ((_, float32),) = find_results([tmp_path / "float"])
    expected = in_pytorch(RETINANET)
    assert expected["mAP"] >= 0.60
    assert float32.value == pytest.approx(expected["mAP"], abs=1e-3)
    assert int8.value >= 0.98 * expected["mAP"]


def test_shipped_files_fit_in_a_small_repository():
    shipped = [
        p for p in (ROOT / "demo").rglob("*") if p.suffix in {".jpg", ".npz", ".safetensors"}
    ]
    assert sum(p.stat().st_size for p in shipped) <= 18 * 2**20

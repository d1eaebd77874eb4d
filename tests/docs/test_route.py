"""The whole route with the shipped checkpoint, by the commands that users type."""

import json

import pytest

from tests.support import ROOT

CHECKPOINT = ROOT / "demo" / "ssd-resnet34-demo.safetensors"


def test_demo_checkpoint_detects_what_pytorch_detects(demo_result):
    """MAP through ONNX, surgery, ONNX Runtime, LoadGen and its log is that of plain PyTorch."""
    import torch

    from demo.evaluate import DATA, evaluate
    from export.checkpoint import infer_config, load_model, read_checkpoint

    result = json.loads(demo_result.read_text())
    weights = read_checkpoint(CHECKPOINT)
    model = load_model(weights, infer_config(weights))
    expected = evaluate(model, DATA, torch.device("cpu"))
    assert expected["mAP"] >= 0.40
    assert result["accuracy"]["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)
    assert result["accuracy"]["AP50"] == pytest.approx(expected["AP50"], abs=1e-3)
    assert result["accuracy"]["images_seen"] == result["accuracy"]["images_total"] >= 96
    assert len(list((demo_result.parent / "pictures").iterdir())) >= 2


def test_shipped_files_fit_in_a_small_repository():
    shipped = [
        p for p in (ROOT / "demo").rglob("*") if p.suffix in {".jpg", ".npz", ".safetensors"}
    ]
    assert sum(p.stat().st_size for p in shipped) <= 12 * 2**20

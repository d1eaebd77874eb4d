"""Safetensors files: small floats, and configurations in their metadata that are none."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import infer_config, load_model, read_checkpoint
from export.cli import export_onnx
from export.errors import ExportError


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_are_the_numbers_that_they_are(small_checkpoint, tmp_path, kind):
    small = {
        name: t.to(kind) if t.is_floating_point() else t
        for name, t in load_file(small_checkpoint).items()
    }
    save_file(small, tmp_path / "w.safetensors")
    read = read_checkpoint(tmp_path / "w.safetensors")
    model = load_model(read, infer_config(read, (400, 400)))
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), small[name].float()), name
    small["conf.0.bias"][0] = float("nan")
    save_file(small, tmp_path / "w.safetensors")
    with pytest.raises(ExportError, match=r"not finite conf\.0\.bias: 1 of"):
        load_model(read_checkpoint(tmp_path / "w.safetensors"), infer_config(read, (400, 400)))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"width": 64, "width": 16}', '{"image_size": 30000}', '{"width": [64]}'],
    ids=["deep", "twice", "no memory", "a list"],
)
def test_a_configuration_that_is_none(small_checkpoint, tmp_path, text):
    path = tmp_path / "w.safetensors"
    save_file(load_file(small_checkpoint), path, metadata={"ssd_config": text})
    with pytest.raises(ExportError, match=r"w\.safetensors: ssd_config in its metadata") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["onnxscript", "safetensors"])
def test_without_a_package_that_exporting_needs(small_checkpoint, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"^{package} is missing; .* pip install '.*\[export\]'"):
        export_onnx(weights=small_checkpoint, output=tmp_path / "model.onnx")

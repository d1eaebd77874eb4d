"""The file that `export-onnx` is told to write: left, refused or replaced."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
import torch

from export.ssd_resnet34.config import SSDConfig
from tests.support import ROOT
from tests.support.random_model import random_model

pytestmark = pytest.mark.slow  # Python with PyTorch is started several times

ANOTHER = "exists already, and is another: remove it or pass --force\n"


def export(weights, output, *more):
    command = [sys.executable, "-m", "export", "--weights", weights, "-o", output, *more]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_same_is_left_and_another_is_not_replaced(small_checkpoint, exported, tmp_path):
    output = tmp_path / "model.onnx"
    output.write_bytes(exported.read_bytes())
    stamp = output.stat().st_mtime_ns
    done = export(small_checkpoint, output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"] {output} is up to date\n")
    # other class names are in the file's metadata: seen before the export
    (tmp_path / "names.txt").write_text("".join(f"class {n}\n" for n in range(1, 81)))
    done = export(small_checkpoint, output, "--names", tmp_path / "names.txt")
    assert (done.returncode, done.stderr) == (2, f"export-onnx: error: {output}: {ANOTHER}")
    assert "exported" not in done.stdout
    assert output.stat().st_mtime_ns == stamp
    # what metadata does not tell is seen after it
    model = onnx.load(output)
    model.doc_string = "mine"
    onnx.save(model, output)
    done = export(small_checkpoint, output)
    assert (done.returncode, done.stderr) == (2, f"export-onnx: error: {output}: {ANOTHER}")
    assert "exported" in done.stdout
    assert onnx.load(output).doc_string == "mine"
    assert export(small_checkpoint, output, "--force").returncode == 0
    assert output.read_bytes() == exported.read_bytes()


def test_what_is_read_is_not_written(small_checkpoint, tmp_path):
    weights, names = tmp_path / "w.safetensors", tmp_path / "names.txt"
    weights.write_bytes(small_checkpoint.read_bytes())
    names.write_text("cat\n")
    (tmp_path / "link.onnx").symlink_to(weights)
    (tmp_path / "hard.onnx").hardlink_to(names)
    before = weights.read_bytes(), names.read_bytes()
    for output in (weights, names, tmp_path / "link.onnx", tmp_path / "hard.onnx"):
        done = export(weights, output, "--force", "--names", names)
        expected = f"export-onnx: error: {output}: is the input; give the output another name\n"
        assert (done.returncode, done.stderr) == (2, expected)
    assert (weights.read_bytes(), names.read_bytes()) == before


def test_a_guessed_image_size_stands_in_the_file(exported, tmp_path):
    """Not where the weights tell it, or somebody does, which makes another file of it."""
    assert "image_size_guess" not in {one.key for one in onnx.load(exported).metadata_props}
    model = random_model(SSDConfig(width=4))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    size, output = model.config.image_size, tmp_path / "model.onnx"
    done = export(tmp_path / "w.pth", output)
    assert done.returncode == 0, done.stderr
    found = {one.key: one.value for one in onnx.load(output).metadata_props}
    assert found["image_size_guess"] == f"{size}x{size}"
    done = export(tmp_path / "w.pth", output, "--image-size", size)
    assert (done.returncode, done.stderr) == (2, f"export-onnx: error: {output}: {ANOTHER}")

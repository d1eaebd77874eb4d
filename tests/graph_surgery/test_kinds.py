"""What is said of a file that was given as a model and is none."""

from __future__ import annotations

import cv2
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from engine.errors import EngineError
from engine.load import load_engine
from engine.manifest import load_manifest
from engine.model import load_detector
from graph_surgery.errors import SurgeryError
from graph_surgery.files import load
from graph_surgery.kinds import other_kind
from harness.cli.main import app

WEIGHTS = {"weight": torch.zeros(3)}


def older(path):
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "checkpoint: export-onnx": {
        "archive": lambda path: torch.save({"model": WEIGHTS}, path),
        "pickle": older,
        "safetensors": lambda path: save_file(WEIGHTS, path),
    },
    "image": {
        name: lambda path, name=name: path.write_bytes(
            cv2.imencode(f".{name}", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
        )
        for name in ("jpg", "png", "bmp", "tiff", "webp")
    },
    "text": {
        "short": lambda path: path.write_text("hello\n"),
        "cut": lambda path: path.write_text("x" * 4095 + "é" * 9),
    },
    "empty file": {"empty": lambda path: path.touch()},
    "pointer of Git LFS": {
        "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n")
    },
}
EVERY = [
    pytest.param(kind, write, id=name)
    for kind, named in WRITERS.items()
    for name, write in named.items()
]


@pytest.mark.parametrize(("kind", "write"), EVERY)
def test_every_reader_says_what_it_is(kind, write, tmp_path):
    path = tmp_path / "model.onnx"
    write(path)
    with pytest.raises(SurgeryError, match=f"not an ONNX model but an? {kind}"):
        load(path)
    for read in (load_detector, lambda path: load_engine("onnxruntime", path)):
        with pytest.raises(EngineError, match=f"not an ONNX model but an? {kind}"):
            read(path)
    with pytest.raises(EngineError, match=f"no model or engine but an? {kind}"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        (
            "my.pth",
            "export-onnx --weights my.pth -o my.onnx and graph-surgery nms my.onnx my.nms.onnx",
        ),
        (
            "a b.onnx",
            "export-onnx --weights 'a b.onnx' -o 'a b-exported.onnx' and "
            "graph-surgery nms 'a b-exported.onnx' 'a b-exported.nms.onnx'",
        ),
    ],
)
def test_the_commands_for_a_checkpoint_can_be_copied(name, commands, tmp_path, monkeypatch):
    """None of them writes over the checkpoint."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS}, name)
    done = CliRunner().invoke(app, ["predict", name, name])
    assert str(done.exception).endswith(f"but a checkpoint: {commands} make a model of it")


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(EngineError, match=": a folder, no model or engine file"):
        load_manifest(tmp_path)


def test_what_is_unknown_stays_so(tmp_path):
    path = tmp_path / "model.onnx"
    for content in (np.random.default_rng(1).bytes(999), b"\x08\x0b\x12\x07pytorch"):
        path.write_bytes(content)
        assert other_kind(path) == ""
    assert other_kind(tmp_path / "none") == ""
    node = onnx.helper.make_node("Relu", ["a"], ["b"])
    graph = onnx.helper.make_graph([node], "g", [], [])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    assert other_kind(path) == ""

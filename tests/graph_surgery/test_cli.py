"""The graph-surgery command: files in, files out, one-line errors."""

import re
import sys

import numpy as np
import onnx
import pytest

from engine.errors import EngineError
from engine.load import load_engine
from graph_surgery.cli import main
from graph_surgery.nms_function import OP_TYPE
from tests.support.graphs import (
    IMAGE,
    UNCAPPED,
    Variant,
    assert_same_detections,
    detector,
    rows_of_three,
    run,
)


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["graph-surgery", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    out = capsys.readouterr()
    return exit_.value.code or 0, out.out, out.err


def test_command_line(exported, tmp_path, monkeypatch, capsys):
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    code, out, err = command(monkeypatch, capsys, "nms", exported, once)
    assert (code, err) == (0, "")
    assert "proved" in out
    assert str(once) in out
    code, out, _ = command(monkeypatch, capsys, "nms", once, twice)
    assert code == 0
    assert "nothing to do" in out
    assert once.read_bytes() == twice.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once.onnx", "twice.onnx"]
    tables = [command(monkeypatch, capsys, "inspect", path)[1] for path in (exported, once)]
    for table in tables:
        assert "17 x 17" in table  # 400 / 8 = 50, / 3
        assert "0.1, 0.1, 0.2, 0.2" in table
        assert "codeType" in table
    heads = [re.search("Heads.*sizes.*?┘", table, re.DOTALL)[0] for table in tables]
    assert heads[0] == heads[1]


def test_a_file_for_tensorrt_alone(exported, tmp_path, monkeypatch, capsys):
    """The node without its definition: else it is the same, and ONNX Runtime says what it lacks."""
    whole, other = tmp_path / "whole.onnx", tmp_path / "plugin.onnx"
    command(monkeypatch, capsys, "nms", exported, whole)
    for source in (exported, whole):
        code, out, _ = command(monkeypatch, capsys, "nms", source, other, "--plugin-only")
        assert code == 0
        assert "only its plugin can run the file" in out
        model, expected = onnx.load(other), onnx.load(whole)
        assert [f.name for f in expected.functions] == [OP_TYPE]
        del expected.functions[:]
        assert model == expected
    with pytest.raises(EngineError, match="lacks the definition of NMS_OPT_TRT, as files of"):
        load_engine("onnxruntime", other)


def test_a_surgered_model_without_its_function_is_not_copied(
    exported, tmp_path, monkeypatch, capsys
):
    once, out = tmp_path / "once.onnx", tmp_path / "out.onnx"
    assert command(monkeypatch, capsys, "nms", exported, once)[0] == 0
    model = onnx.load(once)
    del model.functions[:]
    onnx.save(model, once)
    code, _, err = command(monkeypatch, capsys, "nms", once, out)
    assert code == 2
    assert "function" in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_external_data(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(
        detector(UNCAPPED), path, save_as_external_data=True, location="w.bin", size_threshold=64
    )
    assert command(monkeypatch, capsys, "nms", path, out)[0] == 0
    image = np.ones((1, 3, IMAGE, IMAGE), np.float32)
    detections, count = run(onnx.load(out), {"image": image})
    expected = rows_of_three(*run(detector(UNCAPPED), {"image": image}))
    assert_same_detections(detections[0, : count[0], 1:], expected)
    (tmp_path / "w.bin").unlink()
    code, _, err = command(monkeypatch, capsys, "nms", path, out)
    assert code == 2
    assert "w.bin" in err


@pytest.mark.parametrize(
    "fault", ["missing", "text", "truncated", "empty", "folder", "wrong graph"]
)
def test_unreadable_input_is_one_line(tmp_path, monkeypatch, capsys, fault):
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    whole = detector(UNCAPPED).SerializeToString()
    if fault == "folder":
        path.mkdir()
    elif fault != "missing":
        broken = detector(Variant(lacks="NonMaxSuppression")).SerializeToString()
        content = {"text": b"not a model\n", "truncated": whole[:-100], "empty": b""}
        path.write_bytes(content.get(fault, broken))
    for arguments in (["nms", path, out], ["inspect", path]):
        code, _, err = command(monkeypatch, capsys, *arguments)
        assert not out.exists()
        if fault == "wrong graph" and "inspect" in arguments:
            assert (code, err) == (0, "")
            continue
        assert code == 2
        assert err.startswith("graph-surgery: error: ")
        assert err.count("\n") == 1


def test_unwritable_output_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "in.onnx"
    onnx.save(detector(UNCAPPED), path)
    before = path.read_bytes()
    (tmp_path / "folder").mkdir()
    for out, message in (
        (path, "is the input"),
        (tmp_path / "nowhere" / "out.onnx", "no such folder"),
        (tmp_path / "folder", "cannot write"),
    ):
        code, _, err = command(monkeypatch, capsys, "nms", path, out)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "in.onnx"]

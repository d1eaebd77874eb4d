"""Files that users name: the same is left, another one stays, and none that is read is written."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from engine.cli import main
from engine.quantization.sensitivity import Noise, Sensitivity

ANOTHER = "exists already, and is another: remove it or pass --force\n"
INPUT = "is the input; give the output another name\n"


@pytest.fixture
def engine(monkeypatch, capsys):
    """Run the command: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["engine", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def files(demo_surgered, demo_cache, demo_build, tmp_path):
    """Copies of the demo detector and its cache, and the folder of its calibration images."""
    model, cache = tmp_path / "model.onnx", tmp_path / "cache.json"
    model.write_bytes(demo_surgered.read_bytes())
    cache.write_bytes(demo_cache.read_bytes())
    return model, cache, demo_build / "preprocessed_data" / "demo-cal" / "float32_400x400"


def check(engine, output, command, after=""):
    """A file of the user stays; --force replaces it; what it was replaced by is then left."""
    output.write_bytes(b"the user's")
    assert engine(*command)[::2] == (2, f"engine: error: {output}: {ANOTHER}")
    assert output.read_bytes() == b"the user's"
    code, out, err = engine(*command, "--force")
    assert (code, err) == (0, "")
    assert f"wrote {output}{after}" in out.replace("\n", " ")
    made, stamp = output.read_bytes(), output.stat().st_mtime_ns
    code, out, err = engine(*command)
    assert (code, err) == (0, "")
    assert f"{output} is up to date" in out.replace("\n", " ")
    assert (output.read_bytes(), output.stat().st_mtime_ns) == (made, stamp)


def check_inputs(engine, folder, inputs, command):
    """Neither an input nor a link to it is written, whatever is forced; `command` takes a path."""
    for number, path in enumerate(inputs):
        soft, hard = folder / f"soft{number}", folder / f"hard{number}"
        soft.symlink_to(path)
        hard.hardlink_to(path)
        before = path.read_bytes()
        for output in (path, soft, hard):
            refusal = f"engine: error: {output}: {INPUT}"
            assert engine(*command(output), "--force") == (2, "", refusal)
        assert path.read_bytes() == before


def test_calibrate(engine, files, tmp_path, monkeypatch):
    model, _, images = files
    output = tmp_path / "new.json"
    command = ["calibrate", model, "--data", images, "--images", 2, "-o", output]
    check(engine, output, command)
    check_inputs(engine, tmp_path, [model], lambda path: [*command[:-1], path])
    # before the images are run; so is what --format names
    monkeypatch.setattr("engine.quantization.calibration.calibrate", pytest.fail)
    before, text = output.read_bytes(), tmp_path / "new.json.trt"
    refusal = f"engine: error: {output}: {ANOTHER}"
    assert engine(*command, "--method", "minmax") == (2, "", refusal)
    text.write_text("mine")
    assert engine(*command, "--format", "trt")[2] == f"engine: error: {text}: {ANOTHER}"
    output.unlink()
    assert engine(*command, "--format", "trt")[2] == f"engine: error: {text}: {ANOTHER}"
    assert text.read_text() == "mine"
    output.write_bytes(before)
    assert engine(*command, "--format", "trt", "--force")[0] == 0
    assert text.read_text().startswith("TRT-")
    assert engine(*command, "--format", "trt")[0] == 0
    assert output.read_bytes() == before


def test_quantize(engine, files, tmp_path):
    model, cache, _ = files
    output = tmp_path / "int8.onnx"
    command = ["quantize", model, cache, output]
    check(engine, output, command)
    before = output.read_bytes()
    refusal = f"engine: error: {output}: {ANOTHER}"
    assert engine(*command, "--float-type", "fp16")[::2] == (2, refusal)
    assert output.read_bytes() == before
    check_inputs(engine, tmp_path, [model, cache], lambda path: [*command[:-1], path])


def test_compare(engine, files, demo_int8, tmp_path, monkeypatch):
    model, _, images = files
    output = tmp_path / "figures.json"
    command = ["compare", model, demo_int8, "--data", images, "--images", 2, "-o", output]
    check(engine, output, command)
    before = output.read_bytes()
    other = json.loads(before) | {"commit": "another", "detections": {}}
    output.write_text(json.dumps(other))
    code, out, err = engine(*command)
    assert (code, err) == (2, f"engine: error: {output}: {ANOTHER}")
    assert "share of detections matched" in " ".join(out.split())  # the figures are shown
    monkeypatch.setattr("engine.comparison.files.compare", pytest.fail)
    output.write_bytes(before)
    assert engine(*command, "--snr", 3) == (2, "", f"engine: error: {output}: {ANOTHER}")
    check_inputs(engine, tmp_path, [model], lambda path: [*command[:-1], path])


def test_sensitivity(engine, files, tmp_path, monkeypatch):
    model, cache, images = files
    found = Sensitivity(3, Noise(20.0, float("inf")), ())
    monkeypatch.setattr("engine.quantization.sensitivity.sensitivity", lambda *_, **__: found)
    output = tmp_path / "layers.json"
    command = ["sensitivity", model, cache, "--data", images, "-o", output]
    check(engine, output, command)
    check_inputs(engine, tmp_path, [model, cache], lambda path: [*command[:-1], path])


@pytest.mark.slow
def test_what_was_made_of_the_same_file_as_it_was_before_is_renewed(engine, files, tmp_path):
    model, _, images = files
    cache, output = tmp_path / "new.json", tmp_path / "int8.onnx"
    calibrate = ["calibrate", model, "--data", images, "--images", 1, "-o", cache]
    assert engine(*calibrate)[0] == 0
    assert engine("quantize", model, cache, output)[0] == 0
    content = onnx.load(model)
    (weight, *_) = (tensor for tensor in content.graph.initializer if len(tensor.dims) == 4)
    value = onnx.numpy_helper.to_array(weight) * np.float32(1.5)
    weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    other = tmp_path / "other.onnx"
    onnx.save(content, other)
    made = cache.read_bytes(), output.read_bytes()
    refused = engine("calibrate", other, *calibrate[2:])
    assert refused == (2, "", f"engine: error: {cache}: {ANOTHER}")
    assert (cache.read_bytes(), output.read_bytes()) == made
    onnx.save(content, model)  # the file itself is another now
    assert f"wrote {cache}" in engine(*calibrate)[1].replace("\n", "")
    assert f"wrote {output}" in engine("quantize", model, cache, output)[1].replace("\n", "")
    assert output.read_bytes() != made[1]
    refused = engine("quantize", model, cache, output, "--keep-float", "loc.*")
    assert refused == (2, "", f"engine: error: {output}: {ANOTHER}")

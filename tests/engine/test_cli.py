"""The engine command, on the demo checkpoint: files in, files out."""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console
from typer.testing import CliRunner

from engine.cli import app
from engine.errors import EngineError
from engine.load import load_engine
from engine.manifest import save_engine
from engine.quantization.cache import Calibration
from engine.quantization.sensitivity import LayerSensitivity, Noise, Sensitivity
from engine.report import calibration_report
from tests.support import ROOT, command
from tests.support.manifests import PLAN, manifest

ANNOTATIONS = ROOT / "demo" / "data" / "annotations" / "instances_val.json"
IMAGES = 12


def engine(*arguments):
    """Run the command in this process: exit code, stdout."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def demo(demo_int8, demo_build, tmp_path_factory):
    """The demo model exported and surgered, its images preprocessed, calibrated, quantised."""
    folder, shared = tmp_path_factory.mktemp("demo"), demo_int8.parent
    for name in ("demo.onnx", "demo.nms.onnx"):
        (folder / name).symlink_to(shared / name)
    for split in ("cal", "val"):
        images = demo_build / "preprocessed_data" / f"demo-{split}" / "float32_400x400"
        (folder / split).symlink_to(images)
    shutil.copy2(shared / "demo.cache.json", folder / "cache.json")
    shutil.copy2(demo_int8, folder / "int8.onnx")
    return folder


def test_unchanged_files_are_left_alone(demo):
    surgered, cache, int8 = demo / "demo.nms.onnx", demo / "cache.json", demo / "int8.onnx"
    before = [path.stat().st_mtime_ns for path in (cache, int8)]
    for words in (
        ["calibrate", surgered, "--data", demo / "cal", "-o", cache],
        ["quantize", surgered, cache, int8],
    ):
        code, out = engine(*words)
        assert code == 0 and "up to date" in out
    assert [path.stat().st_mtime_ns for path in (cache, int8)] == before


def test_a_change_of_method_images_or_weights_calibrates_again(demo, tmp_path):
    surgered, cache = tmp_path / "demo.nms.onnx", tmp_path / "cache.json"
    surgered.write_bytes((demo / "demo.nms.onnx").read_bytes())
    few = ["calibrate", surgered, "--data", demo / "cal", "-o", cache, "--images"]
    assert "from 2 images" in engine(*few, 2)[1]
    assert "up to date" in engine(*few, 2)[1]
    before = cache.read_bytes()
    with pytest.raises(EngineError, match=r"cache\.json: exists already, and is another: "):
        engine(*few, 3)
    assert cache.read_bytes() == before
    assert "from 3 images" in engine(*few, 3, "--force")[1]
    assert "from 3 images" in engine(*few, 3, "--method", "minmax", "--force")[1]
    assert "up to date" in engine(*few, 3, "--method", "minmax")[1]
    model = onnx.load(surgered)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("bias"))
    values = onnx.numpy_helper.to_array(bias) + np.float32(0.1)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, surgered)
    with pytest.raises(EngineError, match="belongs to another model"):
        engine("quantize", surgered, cache, tmp_path / "int8.onnx")
    assert "from 3 images" in engine(*few, 3, "--method", "minmax", "--force")[1]
    assert engine("quantize", surgered, cache, tmp_path / "int8.onnx")[0] == 0


def test_calibration_shows_the_worst_tensors(demo):
    cache = Calibration.load(demo / "cache.json")
    assert engine("calibrate", demo / "demo.nms.onnx", "--data", demo / "cal", "-o",
                  demo / "cache.json")[1].index("Worst tensors") > 0  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(calibration_report(cache))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    worst = sorted(cache.statistics, key=lambda name: cache.statistics[name].snr_db)[:8]
    shown = [line.split() for line in text.splitlines() if line.split()[:1] and "dB" not in line]
    rows = {row[0]: row[1:] for row in shown if row[0] in cache.statistics}
    assert list(rows) == worst
    for name, (auto, entropy, minmax, clipped, snr) in rows.items():
        one = cache.statistics[name]
        assert float(auto) == pytest.approx(cache.scales[name], rel=1e-2)
        assert float(minmax) == pytest.approx(one.scales["minmax"], rel=1e-2)
        assert float(entropy) <= float(minmax) >= float(auto)
        assert (clipped, snr) == (f"{one.clipped:.3%}", f"{one.snr_db:.1f}")


def test_int8_is_held_against_fp32(demo, tmp_path):
    surgered, cache, int8 = demo / "demo.nms.onnx", tmp_path / "cache.json", tmp_path / "int8.onnx"
    check = ["quantize", surgered, cache, int8, "--force", "--check", demo / "cal"]
    good = Calibration.load(demo / "cache.json")
    good.save(cache)
    code, out = engine(*check)
    found = re.search(r"INT8 finds (\d+) of (\d+) FP32 detections on 16 images", out)
    assert code == 0
    assert 0.8 <= int(found[1]) / int(found[2]) <= 1
    assert engine(*check)[1].startswith(f"{int8} is up to date INT8 finds {found[1]} of")
    # one tensor with a hundredth of its range ruins all that is behind it
    worst = "relu_16"
    broken = {**good.scales, worst: good.scales[worst] / 100}
    dataclasses.replace(good, scales=broken).save(cache)
    code, out = engine(*check)
    assert code == 1
    assert "FAILED: INT8 finds" in out and "look at these tensors" in out and "relu" in out
    # and what cannot be checked is said, not failed
    blank = tmp_path / "blank"
    shutil.copytree(demo / "cal", blank)
    for path in blank.glob("*.npy"):
        np.save(path, np.zeros((3, 400, 400), np.float32))
    code, out = engine(*check[:-1], blank)
    assert code == 0 and "FP32 detects nothing on 16 images" in out
    words = ("--data", blank, "-o", cache, "--images", 3, "--force")
    done = command("engine", "calibrate", surgered, *words)
    assert "WARNING: 3 of 3 calibration images show nothing" in " ".join(done.stderr.split())
    done = command("engine", "quantize", surgered, cache, int8, "--force")
    assert "WARNING: 3 of 3 calibration" in " ".join(done.stderr.split())
    facts = {entry.key: entry.value for entry in onnx.load(int8).metadata_props}
    assert (facts["calibration_images"], facts["calibration_empty_images"]) == ("3", "3")


def test_biases_are_corrected_on_the_images_of_the_calibration(demo, tmp_path):
    surgered, cache, int8 = demo / "demo.nms.onnx", tmp_path / "cache.json", tmp_path / "int8.onnx"
    words = [*("quantize", surgered, cache, int8), "--target", "cpu"]
    assert engine("calibrate", surgered, "--data", demo / "cal", "-o", cache, "--images", 2)[0] == 0
    assert engine(*words)[0] == 0
    plain = onnx.load(int8)
    corrected = [*words, "--correct", "bias", "--data", demo / "cal"]
    assert engine(*corrected, "--force")[0] == 0
    assert engine(*corrected)[1] == f"{int8} is up to date"
    assert load_engine("onnxruntime", int8).manifest["correction"] == "bias"
    biases = [
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if "bias" in t.name}
        for model in (plain, onnx.load(int8))
    ]
    steps = [
        np.concatenate([v.ravel() for v in one.values() if v.dtype == np.int32]) for one in biases
    ]
    assert (steps[0] != steps[1])[steps[0] != 0].mean() > 0.9
    for half in (["--correct", "bias"], ["--data", demo / "cal"]):
        with pytest.raises(EngineError, match="--correct and --data go together"):
            engine(*words, *half)
    with pytest.raises(EngineError, match="not the images of the calibration"):
        engine(*corrected[:-1], demo / "val", "--force")


def test_tensorrt_format(demo, tmp_path):
    cache = tmp_path / "cache.json"
    cache.write_bytes((demo / "cache.json").read_bytes())
    command = ["calibrate", demo / "demo.nms.onnx", "--data", demo / "cal", "-o", cache]
    assert engine(*command, "--format", "trt")[0] == 0
    header, *lines = (tmp_path / "cache.json.trt").read_text().splitlines()
    assert header.startswith("TRT-")
    scales = json.loads(cache.read_text())["scales"]
    assert len(lines) == len(scales)
    for line in lines:
        name, digits = line.split(": ")
        assert np.frombuffer(bytes.fromhex(digits), ">f4")[0] == np.float32(scales[name])


def test_keep_float(demo, tmp_path):
    command = ["quantize", demo / "demo.nms.onnx", demo / "cache.json", tmp_path / "int8.onnx"]
    assert engine(*command, "--keep-float", "loc.*", "--keep-float", "conf.0")[0] == 0

    def weights(path):
        return sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)

    assert 7 <= weights(demo / "int8.onnx") - weights(tmp_path / "int8.onnx") <= 9
    with pytest.raises(EngineError, match="no layer matches 'lok"):
        engine(*command, "--keep-float", "lok.*")


def test_int8_against_fp32(demo, tmp_path):
    """Within tolerance, mAP too; not when the model is wrong about the scale of its input."""
    compare = ["compare", demo / "demo.nms.onnx"]
    data = ["--data", demo / "val", "--images", IMAGES]
    document = tmp_path / "compare.json"
    code, _ = engine(
        *compare, demo / "int8.onnx", *data, "--annotations", ANNOTATIONS, "-o", document
    )
    written = json.loads(document.read_text())
    assert written["images"] == IMAGES
    assert written["second"]["input"]["dtype"] == "int8"
    assert written["tolerance"]["precision"] == 0.99
    assert len(written["heads"]) == 12
    checks = {check["what"]: check["passed"] for check in written["checks"]}
    assert code == (0 if all(checks.values()) else 1)
    (mean_precision,) = (what for what in checks if "mAP" in what)
    del checks[mean_precision]  # of few images; tests of quantisation hold all against 99 %
    assert all(checks.values())
    assert written["precision"][1] > 0.9 * written["precision"][0] > 0.4

    few = ["--data", demo / "val", "--images", 2]
    assert engine(*compare, demo / "int8.onnx", *few)[0] == 0
    assert engine(*compare, demo / "int8.onnx", *few, "--snr", 50)[0] == 1
    assert engine(*compare, demo / "int8.onnx", *few, "--score", 0)[0] == 1

    model = onnx.load(demo / "int8.onnx")
    (entry,) = (e for e in model.metadata_props if e.key == "input_scale")
    entry.value = str(float(entry.value) * 1.5)
    onnx.save(model, tmp_path / "wrong.onnx")
    assert engine(*compare, tmp_path / "wrong.onnx", *few)[0] == 1


def test_surgered_against_unsurgered(demo, tmp_path):
    document = tmp_path / "compare.json"
    files = [demo / "demo.onnx", demo / "demo.nms.onnx"]
    code, _ = engine("compare", *files, "--data", demo / "val", "--images", 4, "-o", document)
    written = json.loads(document.read_text())
    assert code == 0
    assert written["tolerance"]["precision"] == 0.999
    assert written["detections"]["matched"] == written["detections"]["first"] > 10
    assert written["precision"] is None
    assert engine("compare", *files, "--random", 2)[0] == 0


def test_inspect(demo, tmp_path):
    _, out = engine("inspect", demo / "demo.onnx")
    assert "float32 [batch, 3, 400, 400]" in out and "standard operators" in out
    _, out = engine("inspect", demo / "int8.onnx")
    assert "int8 [batch, 3, 400, 400]" in out and "NMS_OPT_TRT" in out and "input_scale" in out
    _, out = engine("inspect", demo / "cache.json")
    assert "method auto" in out.replace("│ ", "") and "scale image" in out
    (tmp_path / "c.trt").write_text("TRT-100000-EntropyCalibration2\nimage: 3c000000\n")
    _, out = engine("inspect", tmp_path / "c.trt")
    assert "0.0078125" in out
    for name, content, message in (
        ("a.bin", b"\0\1", "neither an .onnx file"),
        ("b.json", b'{"format": 1', "damaged"),
        ("c.onnx", b"text", "not an ONNX model"),
        ("d.trt", b"TRT-1-X\nimage 12\n", "d.trt, line 2"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EngineError, match=message):
            engine("inspect", tmp_path / name)


def test_inspect_engine(tmp_path):
    save_engine(tmp_path / "m.engine", PLAN, manifest(compute_capabilities=("8.9",)))
    _, out = engine("inspect", tmp_path / "m.engine")
    assert "10.16.1.11" in out and "8.9" in out
    (tmp_path / "m.engine").write_bytes(PLAN.upper())
    with pytest.raises(EngineError, match="engine_sha256"):
        engine("inspect", tmp_path / "m.engine")


def test_sensitivity_prints_and_writes_the_ranking(demo, tmp_path, monkeypatch):
    """The ranking itself has tests of its own; an infinite figure is null in JSON."""
    found = Sensitivity(
        3,
        Noise(20.0, 30.0),
        (
            LayerSensitivity("loc.0", Noise(21.5, float("inf")), Noise(25.0, 30.0), 5.0),
            LayerSensitivity("conf.0", Noise(float("inf"), 31.5), Noise(20.0, 40.0), 0.0),
            LayerSensitivity("a [1]*", Noise(40.0, 40.0), Noise(27.5, 40.0), 7.5),
        ),
    )
    asked = {}

    def stand_in(model, calibration, images, **choices):
        asked.update(choices, files=len(images.files))
        return found

    monkeypatch.setattr("engine.quantization.sensitivity.sensitivity", stand_in)
    document = tmp_path / "s.json"
    code, out = engine(
        "sensitivity",
        *(demo / "demo.nms.onnx", demo / "cache.json", "--data", demo / "cal"),
        *("--images", 3, "-o", document),
    )
    assert code == 0
    assert out.index("loc.0") < out.index("conf.0")
    assert (asked["limit"], asked["files"]) == (3, 64)
    layers = json.loads(document.read_text(), parse_constant=pytest.fail)["layers"]
    assert [layer["layer"] for layer in layers] == ["loc.0", "conf.0", "a [1]*"]
    last = shlex.split(out.splitlines()[-1])
    patterns = last[last.index("--keep-float") + 1 :: 2]
    names = [layer.layer for layer in found.layers]
    assert [fnmatch.filter(names, one) for one in patterns] == [["a [1]*"], ["loc.0"]]
    assert "gain: the dB" in out
    assert layers[0]["only_quantized"] == {"loc_db": 21.5, "conf_db": None}


def test_build_options_reach_the_builder(tmp_path, monkeypatch):
    class Built:
        engine_bytes, seconds = 5, 0.5

    calls = []
    monkeypatch.setattr(
        "engine.backends.tensorrt.build.build", lambda *call, **_: calls.append(call) or Built
    )
    monkeypatch.setattr("engine.model.load_detector", lambda path: path)
    command = ["build", "m.onnx", "--backend", "tensorrt-rtx", "-o", tmp_path / "m.engine"]
    assert engine(*command)[0] == 0
    code, out = engine(
        *command,
        *("--min-batch", 2, "--opt-batch", 4, "--max-batch", 8, "--memory-pool", "workspace=512"),
        *("--plugin", "a.so", "--plugin", "b.so", "--compute-capability", "8.9"),
        *("--verbosity", "info", "--layer-info", "l.json", "--timing-cache", "t.cache"),
        *("--version-compatible", "--hardware-compatible"),
        *("--optimization-level", 5, "--tf32", "--strip-plan", "--refit"),
    )
    assert code == 0 and "5 bytes" in out
    from engine.backends.tensorrt.options import BuildOptions

    assert calls[0][1:] == ("tensorrt-rtx", tmp_path / "m.engine", BuildOptions())
    assert calls[1][3] == BuildOptions(
        min_batch=2,
        opt_batch=4,
        max_batch=8,
        memory_pools={"workspace": 512 * 2**20},
        timing_cache=Path("t.cache"),
        optimization_level=5,
        tf32=True,
        version_compatible=True,
        hardware_compatible=True,
        strip_plan=True,
        refit=True,
        verbosity="info",
        layer_info=Path("l.json"),
        plugins=(Path("a.so"), Path("b.so")),
        compute_capabilities=("8.9",),
    )
    assert engine(*command, "--device", 1)[0] == 0
    assert calls[2][3] == BuildOptions(device=1)


def test_what_takes_a_calibration_set_asks_for_one(demo, tmp_path):
    model, cache = demo / "demo.nms.onnx", demo / "cache.json"
    for words in (
        ["calibrate", model, "-o", tmp_path / "c.json", "--data"],
        ["quantize", model, cache, tmp_path / "o.onnx", "--check"],
        ["sensitivity", model, cache, "--data"],
    ):
        with pytest.raises(EngineError, match="--dataset NAME --cal_only` first"):
            engine(*words, tmp_path)


def test_unfit_data_is_refused(demo, tmp_path):
    files = [demo / "demo.onnx", demo / "demo.nms.onnx"]
    with pytest.raises(EngineError, match="holds no preprocessed images"):
        engine("compare", *files, "--data", tmp_path)
    with pytest.raises(EngineError, match="999 images asked for"):
        engine("compare", *files, "--data", demo / "val", "--images", 999)
    with pytest.raises(EngineError, match="lacks 3 of 3 images"):
        engine(
            *("compare", *files, "--data", demo / "cal", "--images", 3),
            *("--annotations", ANNOTATIONS),
        )

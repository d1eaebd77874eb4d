"""The make targets on a small benchmark: what is typed, and exactly what is stale rebuilt."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest

import harness.data.preprocess
import harness.data.record
import harness.make.route
from engine.support.files import file_sha256
from harness.make.route import _QUANTIZATION_CODE, build_int8, build_onnx, route_of
from harness.make.targets import val_images
from tests.support.small_benchmark import BENCHMARK, CAL, ROOT, VAL, small_benchmark, write_map
from tests.support.triton_servers import server_command
from tests.test_arrows import MODULES, imported

STEPS = (
    "export-onnx",
    "graph-surgery",
    "preprocess demo-cal",
    "calibrate",
    "quantize",
    "preprocess demo-val",
)


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "BUILD_DIR": str(place / "build")}


def make(place: Path, target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make TARGET` with this Python in place of that of .venv."""
    binary = f"BIN={Path(sys.executable).parent}"
    (place / ".venv").mkdir(exist_ok=True)
    (place / "pyproject.toml").touch()
    (place / "constraints.txt").touch()
    (place / ".venv" / "installed").touch()
    return subprocess.run(
        ["make", "-f", ROOT / "Makefile", binary, target, f"RUN_ARGS={' '.join(arguments)}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        env=environment(place),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_checkpoint, exported):
    """After `make run`; the export, which is slow, is the other tests' of the same checkpoint."""
    place = small_benchmark(tmp_path_factory.mktemp("make"), small_checkpoint)
    genuine = harness.make.route._command

    def command(room: str, *arguments: str | Path) -> None:
        if room == "export":
            shutil.copyfile(exported, arguments[arguments.index("-o") + 1])
        else:
            genuine(room, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.make.route, "_command", command)
        patch.chdir(place)
        build_onnx(route_of(BENCHMARK, None, Path("build"), lambda _: None))
    done = make(
        place,
        "run",
        f"--benchmarks={BENCHMARK} --scenarios offline,Server",
        "--test_mode=AccuracyOnly,PerformanceOnly --config_ver=default",
    )
    assert done.returncode == 0, done.stderr
    (place / "stdout").write_text(done.stdout)
    return place


def route_steps(place: Path, monkeypatch) -> dict[str, str]:
    """Bring the route up to date; returns what was said of each step."""
    monkeypatch.chdir(place)
    lines: list[str] = []
    route = route_of(BENCHMARK, None, Path("build"), lines.append)
    images = val_images(route, build_int8(route, "cpu").path)
    assert len(images.files) >= VAL - 1
    said = dict(line.split(": ", 1) for line in lines if not line.startswith("removed "))
    assert tuple(said) == STEPS
    return said


def rebuilt(said: dict[str, str]) -> dict[str, str]:
    """Steps that were not reused, and the reasons."""
    for text in said.values():
        assert text.startswith(("reused ", "rebuilding because "))
    return {
        step: text.removeprefix("rebuilding because ").partition(":")[0]
        for step, text in said.items()
        if not text.startswith("reused ")
    }


def input_scale(place: Path) -> str:
    model = onnx.load(place / "build" / "onnx" / f"{BENCHMARK}.int8.cpu.onnx")
    return next(entry.value for entry in model.metadata_props if entry.key == "input_scale")


def test_make_run_goes_from_the_weights_to_results(place):
    text = (place / "stdout").read_text()
    for number, step in enumerate(STEPS):
        assert f"{step}: {'reused' if number < 2 else 'making'} " in text
    assert "VALID" in text
    logs = place / "build" / "logs"
    results = {
        path.relative_to(logs).parts[1:-1]: json.loads(path.read_text())
        for path in logs.rglob("result.json")
    }
    assert results.keys() == {
        ("small", BENCHMARK, scenario, mode)
        for scenario in ("Offline", "Server")
        for mode in ("AccuracyOnly", "PerformanceOnly")
    }
    for (_, _, scenario, mode), result in results.items():
        assert (result["scenario"], result["mode"]) == (scenario, mode)
        assert result["engine"]["input"]["dtype"] == "int8"
        assert result["settings"]["min_duration_ms"] == 300
    assert results["small", BENCHMARK, "Offline", "PerformanceOnly"]["settings"]["batch_size"] == 2
    images = results["small", BENCHMARK, "Offline", "AccuracyOnly"]["accuracy"]["images_total"]
    assert images == VAL


def test_make_calibrate_holds_int8_against_fp32(place):
    done = make(place, "calibrate", f"--benchmarks={BENCHMARK}")
    text = " ".join(done.stdout.split())
    assert f"scales from {CAL} images by auto" in text and "Worst tensors" in text
    found, wanted = map(int, re.search(r"INT8 finds (\d+) of (\d+) FP32 detections", text).groups())
    assert (done.returncode == 0) == (found >= 0.8 * wanted), done.stderr
    cache = place / "build" / "calibration" / f"{BENCHMARK}.json"
    good = cache.read_bytes()
    content = json.loads(good)
    content["scales"] = {name: scale / 50 for name, scale in content["scales"].items()}
    cache.write_text(json.dumps(content))
    record = cache.with_name(f"{cache.name}.inputs.json")
    kept = record.read_bytes()
    record.write_bytes(kept.replace(sha256(good).hexdigest().encode(), file_sha256(cache).encode()))
    try:
        done = make(place, "calibrate", f"--benchmarks={BENCHMARK}")
    finally:
        cache.write_bytes(good)
        record.write_bytes(kept)
        make(place, "calibrate", f"--benchmarks={BENCHMARK}")
    assert re.search(r"make: .* Error 1$", done.stderr.strip()), done.stderr
    assert "FAILED: INT8 finds" in done.stdout and "look at these tensors" in done.stdout
    assert "int8.onnx does not find what" in done.stderr


@pytest.mark.triton
def test_make_run_through_triton(place, monkeypatch):
    """A server is started, gives the same answers as the engine itself, and is stopped."""
    monkeypatch.setenv("PATH", f"{server_command().parent}:{os.environ['PATH']}")
    arguments = (f"--benchmarks={BENCHMARK}", "--test_mode=AccuracyOnly", "--config_ver=triton")
    done = make(place, "run", *arguments)
    assert done.returncode == 0, done.stderr
    logs = {
        json.loads((path.parent / "result.json").read_text())["engine"]["backend"]: path
        for path in (place / "build" / "logs").rglob(
            "Offline/AccuracyOnly/mlperf_log_accuracy.json"
        )
    }
    direct, served = (
        {entry["qsl_idx"]: entry["data"] for entry in json.loads(logs[name].read_text())}
        for name in ("onnxruntime", "triton")
    )
    assert served == direct
    assert any(direct.values())
    (url,) = json.loads((logs["triton"].parent / "result.json").read_text())["engine"]["devices"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(url.split(":"), 1)


def test_make_run_without_a_triton_server(place):
    done = make(place, "run", f"--benchmarks={BENCHMARK}", "--config_ver=triton")
    assert done.returncode != 0
    assert "--url HOST:PORT, or install one with 'make triton_server'" in done.stderr


def test_nothing_is_rebuilt_when_nothing_changed(place, monkeypatch):
    assert rebuilt(route_steps(place, monkeypatch)) == {}
    for path in (place / "demo").rglob("*.*"):
        path.touch()
    assert rebuilt(route_steps(place, monkeypatch)) == {}


def test_new_weights(place, monkeypatch):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    weights = place / "demo" / f"{BENCHMARK}.safetensors"
    size = weights.stat().st_size
    with safe_open(weights, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["loc.0.bias"] = tensors["loc.0.bias"] + np.float32(0.25)
    save_file(tensors, weights, metadata)
    assert weights.stat().st_size == size
    # the images stay, and with them the scale of the input
    assert rebuilt(route_steps(place, monkeypatch)) == {
        "export-onnx": "weights changed",
        "graph-surgery": "ONNX changed",
        "calibrate": "ONNX changed",
        "quantize": "ONNX, calibration changed",
    }
    model = onnx.load(place / "build" / "onnx" / f"{BENCHMARK}.int8.cpu.onnx")
    biases = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    wanted = tensors["loc.0.bias"]
    assert any(b.shape == wanted.shape and np.allclose(b, wanted, atol=1e-6) for b in biases)


def test_new_calibration_map(place, monkeypatch):
    before = input_scale(place)
    names = (place / "data_maps" / "demo" / "cal_map.txt").read_text().split()
    write_map(place, "cal", names[1:])
    said = rebuilt(route_steps(place, monkeypatch))
    expected = {
        "preprocess demo-cal": "map changed",
        "calibrate": "calibration images changed",
        "quantize": "calibration changed",
    }
    if input_scale(place) != before:
        assert "preprocess demo-val" in said
        expected["preprocess demo-val"] = said["preprocess demo-val"]
    assert said == expected
    cache = json.loads((place / "build" / "calibration" / f"{BENCHMARK}.json").read_text())
    assert cache["images"] == len(names) - 1


def test_new_validation_image(place, monkeypatch):
    folder = place / "demo" / "data" / "val"
    first, second, *_ = sorted(folder.iterdir())
    shutil.copyfile(second, first)
    said = rebuilt(route_steps(place, monkeypatch))
    assert list(said) == ["preprocess demo-val"]
    assert said["preprocess demo-val"].startswith("1 of 4 images in demo/data/val have changed")
    sets = (place / "build" / "preprocessed_data" / "demo-val").glob("int8_*x*")
    (directory,) = (path for path in sets if path.is_symlink())
    new = np.load(directory / f"{first.name}.npy")
    assert np.array_equal(new, np.load(directory / f"{second.name}.npy"))


def test_a_shorter_validation_map(place, monkeypatch):
    names = (place / "data_maps" / "demo" / "val_map.txt").read_text().split()
    write_map(place, "val", names[:-1])
    assert rebuilt(route_steps(place, monkeypatch)) == {"preprocess demo-val": "map changed"}


def test_an_artefact_that_somebody_changed(place, monkeypatch):
    model = place / "build" / "onnx" / f"{BENCHMARK}.int8.cpu.onnx"
    content = model.read_bytes()
    model.write_bytes(content + b"\0")
    said = rebuilt(route_steps(place, monkeypatch))
    assert said == {"quantize": "it was changed after it was made"}
    assert model.read_bytes() == content


def test_changed_code(place, monkeypatch):
    genuine = harness.make.route.code_sha256

    def other(*patterns: str) -> str:
        return "other" if patterns == ("graph_surgery/*.py",) else genuine(*patterns)

    monkeypatch.setattr(harness.make.route, "code_sha256", other)
    # surgery makes the same file again, so nothing behind it is stale
    assert rebuilt(route_steps(place, monkeypatch)) == {"graph-surgery": "code changed"}
    monkeypatch.undo()
    assert rebuilt(route_steps(place, monkeypatch)) == {"graph-surgery": "code changed"}


def test_changed_preprocessing_code(place, monkeypatch):
    genuine = harness.make.route.code_sha256

    def other(*patterns: str) -> str:
        return "other" if patterns == ("harness/data/transform.py",) else genuine(*patterns)

    for module in (harness.make.route, harness.data.record, harness.data.preprocess):
        monkeypatch.setattr(module, "code_sha256", other)
    links = [p for p in (place / "build" / "preprocessed_data").glob("*/*") if p.is_symlink()]
    files = sorted(path for link in links for path in link.glob("*.npy"))
    before = [path.stat().st_mtime_ns for path in files]
    # the images come out the same, so the scales do, and nothing behind them is stale
    assert rebuilt(route_steps(place, monkeypatch)) == {
        "preprocess demo-cal": "code changed",
        "calibrate": "calibration images changed",
        "preprocess demo-val": "code changed",
    }
    named = {
        f"{name}.npy"
        for split in ("val", "cal")
        for name in (place / "data_maps" / "demo" / f"{split}_map.txt").read_text().split()
    }
    for path, earlier in zip(files, before, strict=True):
        assert (path.stat().st_mtime_ns > earlier) == (path.name in named)
    monkeypatch.undo()
    assert len(rebuilt(route_steps(place, monkeypatch))) == 3


def test_a_damaged_record_is_no_record(place, monkeypatch):
    record = place / "build" / "onnx" / f"{BENCHMARK}.int8.cpu.onnx.inputs.json"
    record.write_text(record.read_text()[:20])
    said = rebuilt(route_steps(place, monkeypatch))
    assert said == {"quantize": "nothing tells what it was made from"}


def test_an_onnx_file_as_weights_needs_no_export(place, monkeypatch):
    monkeypatch.chdir(place)
    lines: list[str] = []
    detector = Path("build") / "onnx" / f"{BENCHMARK}.onnx"
    route = route_of("ssd-resnet34", detector, Path("build"), lines.append)
    surgered = build_onnx(route)
    assert lines == [f"graph-surgery: making {surgered}"]
    assert surgered.read_bytes() == Path(f"build/onnx/{BENCHMARK}.nms.onnx").read_bytes()


def test_missing_weights(place):
    done = make(place, "calibrate", "--benchmarks=ssd-resnet34 --dataset=demo")
    assert done.returncode != 0
    assert "harness: error: " in done.stderr
    assert "resnet34-ssd1200.pytorch: no such weights" in done.stderr


def test_all_that_decides_a_calibration_is_watched():
    """What calibrating and quantising import of ours, but for how they read files and complain."""
    found, waiting = set(), ["engine.quantization.calibration", "engine.quantization.quantize"]
    while waiting:
        path = MODULES[waiting.pop()]
        if path not in found:
            found.add(path)
            waiting += imported(path) & MODULES.keys()
    rooms = [ROOT / "engine" / room for room in ("support", "backends")]
    rooms += [ROOT / "engine" / file for file in ("errors.py", "protocol.py")]
    watched = {path for pattern in _QUANTIZATION_CODE for path in ROOT.glob(pattern)}
    assert {p for p in found if not any(p.is_relative_to(room) for room in rooms)} <= watched

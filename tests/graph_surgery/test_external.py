"""Models with data in files beside them, and models that no protobuf holds."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_surgery import protobuf
from graph_surgery.errors import SurgeryError
from graph_surgery.files import load, save
from graph_surgery.protobuf import Runner, values_of
from graph_surgery.replace import insert_nms
from tests.support import ROOT
from tests.support.graphs import (
    IMAGE,
    UNCAPPED,
    Variant,
    assert_same_detections,
    detector,
    rows_of_three,
    run,
)

WEIGHT = "w"


def product(values: np.ndarray) -> onnx.ModelProto:
    """Model y = x w for x [n, 64]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", WEIGHT], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(values, WEIGHT)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def written(path: Path, values: np.ndarray, location: str = "w.bin") -> Path:
    """A file of `product` with its weight in another file, by onnx's own writer."""
    onnx.save(product(values), path, save_as_external_data=True, location=location)
    return path


def assert_same_graph(found: onnx.ModelProto, expected: onnx.ModelProto) -> None:
    """But for the note that data is no longer outside, which onnx's reader leaves."""
    for tensor in found.graph.initializer:
        tensor.ClearField("data_location")
    assert found.graph == expected.graph


def values(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("opset", [10, 18])
def test_surgery_keeps_data_outside(tmp_path, opset):
    """As with the whole model in one file, in ONNX Runtime and by onnx's own reader."""
    model = detector(Variant(cap=UNCAPPED.cap, opset=opset))
    source, out = tmp_path / "sub" / "in.onnx", tmp_path / "out.onnx"
    source.parent.mkdir()
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, source, save_as_external_data=True, location="w.bin", size_threshold=64)
    loaded = load(source)
    assert (
        sum(map(protobuf.is_outside, loaded.graph.initializer)) == 6
    )  # of the convolutions, but for three
    assert save(insert_nms(loaded).model, out)
    (data,) = tmp_path.glob("out.onnx.*")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert names(tmp_path) == ["out.onnx", f"out.onnx.{digest[:16]}.data", "sub"]
    onnx.checker.check_model(os.fspath(out), full_check=True)
    inside = insert_nms(model).model
    assert_same_graph(onnx.load(out), inside)
    image = np.random.default_rng(4).normal(size=(2, 3, IMAGE, IMAGE)).astype(np.float32)
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    detections, counts = session.run(None, {"image": image})
    for index in range(2):
        expected = rows_of_three(*run(model, {"image": image[index : index + 1]}))
        assert counts[index] == len(expected) > 0
        assert_same_detections(detections[index, : counts[index], 1:], expected)


def test_what_is_written_replaces_model_and_data_together(tmp_path):
    path = tmp_path / "m.onnx"
    for seed in (0, 1):
        written(tmp_path / f"{seed}.onnx", values(seed), f"{seed}.bin")
    first, second = (load(tmp_path / f"{seed}.onnx") for seed in (0, 1))
    assert save(first, path, overwrite=False)
    before = names(tmp_path)
    stamps = [one.stat().st_mtime_ns for one in sorted(tmp_path.iterdir())]
    assert not save(first, path, overwrite=False)
    with pytest.raises(SurgeryError, match=r"m\.onnx: exists already, and is another: "):
        save(second, path, overwrite=False)
    assert names(tmp_path) == before
    assert [one.stat().st_mtime_ns for one in sorted(tmp_path.iterdir())] == stamps
    assert save(second, path)
    assert len(names(tmp_path)) == len(before)  # the data of the first is gone
    np.testing.assert_array_equal(values_of(load(path).graph.initializer[0]), values(1))
    # what another file reads, or what we did not write, stays
    (tmp_path / "kept.onnx").write_bytes(path.read_bytes())
    assert save(product(values(2)), path)
    np.testing.assert_array_equal(
        numpy_helper.to_array(onnx.load(tmp_path / "kept.onnx").graph.initializer[0]), values(1)
    )
    written(tmp_path / "1.onnx", values(3), "1.bin")
    save(first, tmp_path / "1.onnx")
    assert (tmp_path / "1.bin").exists()


def test_an_interrupted_writer_leaves_the_old_pair(tmp_path, monkeypatch):
    """The data is there, the model is not yet."""
    path = tmp_path / "m.onnx"
    save(load(written(tmp_path / "a.onnx", values(0), "a.bin")), path)
    new = load(written(tmp_path / "b.onnx", values(1), "b.bin"))
    replace, done = Path.replace, []

    def second_fails(source, target):
        done.append(target)
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(SurgeryError, match=r"m\.onnx: cannot write it: No space left"):
        save(new, path)
    assert done[1] == path
    np.testing.assert_array_equal(values_of(load(path).graph.initializer[0]), values(0))
    assert not list(tmp_path.glob("*.tmp"))


def test_data_that_was_changed_is_written_again(tmp_path):
    path = tmp_path / "m.onnx"
    model = load(written(tmp_path / "a.onnx", values(0), "a.bin"))
    save(model, path)
    (data,) = tmp_path.glob("m.onnx.*")
    data.write_bytes(bytes(len(data.read_bytes())))
    assert save(model, path, overwrite=False)
    np.testing.assert_array_equal(values_of(load(path).graph.initializer[0]), values(0))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "w.bin"),
        ("truncated", "w.bin ends before the values of 'w': truncated"),
        ("length", "'w' has 16380 bytes of data, not 16384"),
        ("elsewhere", "outside"),
    ],
)
def test_unusable_data_is_one_line(tmp_path, fault, message):
    folder = tmp_path / "models"
    folder.mkdir()
    path, data = written(folder / "m.onnx", values(0)), folder / "w.bin"
    model = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry for entry in model.graph.initializer[0].external_data}
    if fault == "missing":
        data.unlink()
    elif fault == "truncated":
        data.write_bytes(data.read_bytes()[:-4])
    elif fault == "length":
        entries["length"].value = "16380"
    else:
        data.rename(tmp_path / "w.bin")
        entries["location"].value = "../w.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SurgeryError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_models_that_no_protobuf_holds(tmp_path, monkeypatch):
    """With a limit that small ones exceed: they are run, checked and written all the same."""
    model, out = product(values(0)), tmp_path / "out.onnx"
    monkeypatch.setattr(protobuf, "LARGEST", 10_000)
    protobuf.check(model)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    np.testing.assert_allclose(Runner(model)({"x": x})["y"], x @ values(0), rtol=1e-4, atol=1e-5)
    typed = protobuf.with_types(model)
    assert typed.graph.initializer == model.graph.initializer
    assert [value.name for value in typed.graph.input] == ["x"]
    save(model, out)
    assert out.stat().st_size < 1000
    assert_same_graph(onnx.load(out), model)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 63
    with pytest.raises(SurgeryError, match="shape"):
        protobuf.check(model)


def test_outputs_that_a_user_names(tmp_path):
    model, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(
        detector(UNCAPPED), model, save_as_external_data=True, location="w.bin", size_threshold=64
    )
    (tmp_path / "link.onnx").symlink_to(model)
    (tmp_path / "hard.onnx").hardlink_to(model)

    def nms(*arguments):
        command = [sys.executable, "-m", "graph_surgery", "nms", model, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        return done.returncode, done.stdout.splitlines()[-1:], done.stderr

    def refusal(path, why):
        return 2, [], f"graph-surgery: error: {path}: {why}\n"

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("in.onnx", "link.onnx", "hard.onnx", "w.bin"):
        expected = refusal(tmp_path / name, "is the input; give the output another name")
        assert nms(tmp_path / name, "--force") == expected
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    out.write_bytes(b"the user's")
    why = "exists already, and is another: remove it or pass --force"
    assert nms(out) == refusal(out, why)
    assert out.read_bytes() == b"the user's"
    assert nms(out, "--force") == (0, [f"wrote {out}"], "")
    assert nms(out) == (0, [f"{out} is up to date"], "")
    assert nms(out, "--plugin-only") == refusal(out, why)


@pytest.mark.slow
def test_more_than_two_gib(tmp_path):
    """Half a minute, 2.2 GB on the disk. ONNX Runtime copies the table to fold what reads it."""
    path, size = tmp_path / "in.onnx", 2200 << 20
    model = detector(UNCAPPED)
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(size)
        file.seek(size - 4)
        file.write(np.float32(2.5).tobytes())
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[size >> 10, 256])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "big.bin"), ("offset", "0"), ("length", str(size))):
        table.external_data.add(key=key, value=value)
    last = numpy_helper.from_array(np.array([(size >> 10) - 1]), "last")
    model.graph.initializer.extend([table, last])
    model.graph.node.append(helper.make_node("Gather", ["table", "last"], ["extra"]))
    model.graph.output.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, [1, 256]))
    path.write_bytes(model.SerializeToString())
    code = (
        "import atexit, resource; from graph_surgery.cli import main;"
        "atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss));"
        "main()"
    )
    command = [sys.executable, "-c", code, "nms", path, tmp_path / "out.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.splitlines()[-1]) < 6 << 20  # KiB
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert size <= data.stat().st_size < size + (1 << 20)
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    image = np.ones((1, 3, IMAGE, IMAGE), np.float32)
    detections, count, extra = session.run(
        ["detections", "num_detections", "extra"], {"image": image}
    )
    assert extra[0, -1] == 2.5
    expected = rows_of_three(*run(detector(UNCAPPED), {"image": image}))
    assert_same_detections(detections[0, : count[0], 1:], expected)

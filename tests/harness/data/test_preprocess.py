"""Preprocessing a set, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.data.preprocessed import load_preprocessed
from engine.errors import EngineError
from engine.protocol import InputSpec
from harness.data.dataset import Dataset
from harness.data.preprocess import open_current, preprocess
from harness.errors import HarnessError
from tests.support.image_sets import SPEC, make_dataset, run, write_times
from tests.support.photos import photo, reference

pytestmark = pytest.mark.slow  # each starts a process or two

INT8 = InputSpec("image", (3, 96, 128), "int8", 0.0207925)


def test_set_holds_every_image_in_map_order(tmp_path: Path) -> None:
    images = {f"{name}.png": photo(50 + 7 * n, 91 - 5 * n, n) for n, name in enumerate("dbca")}
    dataset = make_dataset(tmp_path, images)
    result = preprocess(
        dataset,
        SPEC,
        tmp_path / "out",
        workers=2,
        overwrite=False,
        skip_bad=False,
        progress=True,
        say=print,
    )
    assert result.files == ("d.png", "b.png", "c.png", "a.png")
    assert result.manifest["dataset"] == "test"
    assert result.manifest["bad"] == []
    for opened in (result, load_preprocessed(tmp_path / "out", SPEC)):
        batch = opened.load([3, 0, 3])
        assert batch.dtype == np.float32
        assert batch.flags.c_contiguous
        for image, name in zip(batch, ["a.png", "d.png", "a.png"], strict=True):
            np.testing.assert_allclose(image, reference(images[name], 96, 128), rtol=0, atol=1e-5)
    stored = np.load(tmp_path / "out" / "b.png.npy")
    np.testing.assert_array_equal(stored, result.load([1])[0])
    names = {path.name for path in result.directory.iterdir()}
    assert names == {"manifest.json", *(f"{name}.npy" for name in result.files)}
    left = {path.name for path in tmp_path.glob("out*")}
    assert left == {"out", "out.lock", result.directory.name}
    assert result.load([]).shape == (0, 3, 96, 128)


def test_only_what_changed_is_done_again(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {f"{n}.jpg": photo(40, 50, n) for n in range(6)})
    out = tmp_path / "out"
    run(dataset, out)
    before = write_times(out)
    (out / "0.jpg.npy").write_bytes((out / "0.jpg.npy").read_bytes()[:-1])  # cut short
    np.save(out / "1.jpg.npy", np.zeros((3, 96, 128), np.int32))  # same size, other dtype
    (out / "2.jpg.npy").unlink()
    cv2.imwrite(str(tmp_path / "images" / "3.jpg"), photo(44, 55, 33))  # other source
    changed = {"0.jpg.npy", "1.jpg.npy", "2.jpg.npy", "3.jpg.npy"}
    result = run(dataset, out)
    after = write_times(out)
    assert {name for name in after if after[name] != before[name]} == changed
    for index, name in enumerate(result.files):
        expected = reference(cv2.imread(str(tmp_path / "images" / name)), 96, 128)
        np.testing.assert_allclose(result.load([index])[0], expected, rtol=0, atol=1e-5)
    run(dataset, out)
    assert write_times(out) == after
    run(dataset, out, overwrite=True)
    assert not set(write_times(out).items()) & set(after.items())


def test_the_hash_decides_where_only_the_time_differs(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {f"{n}.png": photo(40, 50, n) for n in range(3)})
    images, out = dataset.image_dir, tmp_path / "out"
    content = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(content + b"1")
    run(dataset, out)
    before = write_times(out)
    (images / "1.png").write_bytes(content + b"2")  # another file of the same size
    for name in ("0.png", "1.png"):
        os.utime(images / name, ns=(1, 1))  # as a copy of the data set has it
    result = run(dataset, out)
    after = write_times(out)
    assert {name for name in after if after[name] != before[name]} == {"1.png.npy"}
    for entry in result.manifest["images"]:
        path = images / entry["file"]
        assert entry["sha256"] == sha256(path.read_bytes()).hexdigest()
        assert (entry["size"], entry["mtime_ns"]) == (
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
    assert result.manifest["map_sha256"] == sha256(dataset.map_file.read_bytes()).hexdigest()


def test_a_changed_data_set_is_not_run(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    dataset = make_dataset(tmp_path, {name: photo(40, 50, n) for n, name in enumerate(names)})
    images, out = dataset.image_dir, tmp_path / "out"
    run(dataset, out)
    (images / "c.png").touch()
    assert open_current(dataset, SPEC, out).files == tuple(names)
    for text in ("b.png\na.png\nc.png\n", "a.png\nb.png\n", "a.png\nb.png\nc.png\nd.png\n"):
        dataset.map_file.write_text(text)
        with pytest.raises(HarnessError, match=r"another map than .*map\.txt"):
            open_current(dataset, SPEC, out)
    dataset.map_file.write_text("a.png\r\nb.png\r\nc.png")  # the same images
    cv2.imwrite(str(images / "b.png"), photo(30, 30))
    with pytest.raises(HarnessError, match=r"1 of 3 images .* have changed .* first is b\.png"):
        open_current(dataset, SPEC, out)
    run(dataset, out)
    assert open_current(dataset, SPEC, out).files == tuple(names)
    shutil.rmtree(images)  # the preprocessed images are enough to run
    assert open_current(dataset, SPEC, out).files == tuple(names)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["images"][0]["sha256"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HarnessError, match="damaged"):
        open_current(dataset, SPEC, out)


def test_a_set_with_skipped_images_is_current(tmp_path: Path) -> None:
    dataset = bad_dataset(tmp_path)
    run(dataset, tmp_path / "out", skip_bad=True)
    assert open_current(dataset, SPEC, tmp_path / "out").files == ("ok1.png", "ok2.png", "ok3.png")


def test_another_scale_is_another_set(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    run(dataset, tmp_path / "out", INT8)
    other = InputSpec("image", (3, 96, 128), "int8", 0.03)
    with pytest.raises(EngineError, match=r"scale 0\.0207.*engine takes 0\.0299"):
        load_preprocessed(tmp_path / "out", other)
    result = run(dataset, tmp_path / "out", other)
    expected = np.rint(reference(photo(40, 50), 96, 128) / np.float32(0.03))
    assert (result.load([0])[0] == expected).mean() > 0.999
    with pytest.raises(EngineError, match=r"scale 0\.0299"):
        load_preprocessed(tmp_path / "out", INT8)


def bad_dataset(root: Path) -> Dataset:
    names = ["ok1.png", "cut.jpg", "ok2.png", "gone.jpg", "zero.jpg", "text.jpg", "ok3.png"]
    dataset = make_dataset(root, {name: photo(64, 64, n) for n, name in enumerate(names)})
    cut = root / "images" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-400])
    (root / "images" / "gone.jpg").unlink()
    (root / "images" / "zero.jpg").write_bytes(b"")
    (root / "images" / "text.jpg").write_text("this is no picture\n" * 50)
    return dataset


def test_bad_images_stop_the_run_and_are_all_named(tmp_path: Path) -> None:
    dataset = bad_dataset(tmp_path)
    with pytest.raises(HarnessError) as caught:
        run(dataset, tmp_path / "out")
    message = str(caught.value)
    assert "4 of 7 images" in message
    assert "\n" not in message
    for part in ("cut.jpg (truncated", "gone.jpg (missing", "zero.jpg (empty", "text.jpg (cannot"):
        assert part in message
    partial = tmp_path / "out.partial"
    listed = (partial / "bad_images.txt").read_text().splitlines()
    names = [line.split("\t")[0] for line in listed]
    assert names == ["cut.jpg", "gone.jpg", "zero.jpg", "text.jpg"]
    with pytest.raises(EngineError, match="unfinished"):
        load_preprocessed(tmp_path / "out", SPEC)
    # a complete set stays what it was when an image goes bad, but is not current
    good = make_dataset(tmp_path / "other", {"a.png": photo(8, 8), "b.png": photo(9, 9)})
    run(good, tmp_path / "once")
    (good.image_dir / "b.png").write_bytes(b"")
    with pytest.raises(HarnessError, match="1 of 2 images"):
        run(good, tmp_path / "once")
    with pytest.raises(HarnessError, match=r"1 of 2 images .* have changed"):
        open_current(good, SPEC, tmp_path / "once")
    # restored images complete the set without doing the good ones again
    before = write_times(partial)
    for number, name in enumerate(names):
        cv2.imwrite(str(tmp_path / "images" / name), photo(64, 64, number))
    result = run(dataset, tmp_path / "out")
    assert len(result.files) == 7
    assert before.items() <= write_times(tmp_path / "out").items()
    assert not (tmp_path / "out" / "bad_images.txt").exists()


def test_skipped_bad_images_shift_no_name(tmp_path: Path) -> None:
    dataset = bad_dataset(tmp_path)
    result = run(dataset, tmp_path / "out", skip_bad=True)
    assert result.files == ("ok1.png", "ok2.png", "ok3.png")
    assert [entry["file"] for entry in result.manifest["bad"]] == [
        "cut.jpg",
        "gone.jpg",
        "zero.jpg",
        "text.jpg",
    ]
    for index, seed in enumerate((0, 2, 6)):
        expected = reference(photo(64, 64, seed), 96, 128)
        np.testing.assert_allclose(result.load([index])[0], expected, rtol=0, atol=1e-5)


def test_a_set_without_good_images_is_an_error(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.png": photo(8, 8)})
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(HarnessError, match="1 of 1 images"):
        run(dataset, tmp_path / "out", skip_bad=True)


def test_opening_checks_the_engine_input_and_the_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(EngineError, match="holds no preprocessed images"):
        load_preprocessed(out, SPEC)
    run(make_dataset(tmp_path, {f"{n}.png": photo(40, 50, n) for n in range(3)}), out)
    with pytest.raises(EngineError, match="dtype float32, the engine takes int8"):
        load_preprocessed(out, INT8)
    with pytest.raises(EngineError, match=r"image_size \[96, 128\], the engine takes \[96, 96\]"):
        load_preprocessed(out, InputSpec("image", (3, 96, 96), "float32"))
    opened = load_preprocessed(out, SPEC)
    whole = (out / "1.png.npy").read_bytes()
    (out / "1.png.npy").write_bytes(whole[:-4])
    with pytest.raises(EngineError, match=r"1 of 3 .* 1\.png\.npy"):
        load_preprocessed(out, SPEC)
    with pytest.raises(EngineError, match=r"1\.png\.npy is damaged"):
        opened.load([0, 1])
    np.save(out / "1.png.npy", np.zeros((3, 128, 96), np.float32))
    with pytest.raises(EngineError, match=r"1\.png\.npy is damaged"):
        opened.load([1])
    (out / "1.png.npy").unlink()
    with pytest.raises(EngineError, match=r"1\.png\.npy cannot be read"):
        opened.load([1])
    (out / "1.png.npy").write_bytes(whole)
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest[:-40])
    with pytest.raises(EngineError, match="damaged"):
        load_preprocessed(out, SPEC)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (InputSpec("image", (1, 8, 8), "float32"), "1 channels"),
        (InputSpec("image", (3, 8, 8), "int8"), "positive scale"),
        (InputSpec("image", (3, 8, 8), "int8", 0.0), "positive scale"),
        (InputSpec("image", (3, 8, 8), "int8", float("nan")), "positive scale"),
        (InputSpec("image", (3, 8, 8), "float32", 0.1), "takes no scale"),
    ],
)
def test_unusable_specs(tmp_path: Path, spec: InputSpec, problem: str) -> None:
    dataset = make_dataset(tmp_path, {"a.png": photo(8, 8)})
    with pytest.raises(EngineError, match=problem):
        run(dataset, tmp_path / "out", spec)


def test_missing_image_folder(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("a.jpg\n")
    dataset = Dataset("test", tmp_path / "nowhere", tmp_path / "map.txt", None)
    with pytest.raises(HarnessError, match="nowhere of the data set test not found"):
        run(dataset, tmp_path / "out")


def test_a_disk_too_small_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path, {f"{n}.png": photo(40, 50, n) for n in range(3)})
    out = tmp_path / "out"
    image = 3 * 96 * 128 * 4 + 128  # with the header

    class Usage:
        free = 3 * image - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(HarnessError, match="0 MB needed, 0 MB free on this disk; make room"):
        run(dataset, out)
    assert list((tmp_path / "out.partial").iterdir()) == []
    Usage.free += 1
    assert len(run(dataset, out).files) == 3
    Usage.free = 0  # what is there needs no room of its own
    (dataset.image_dir / "2.png").touch()
    assert len(run(dataset, out).files) == 3
    (out / "1.png.npy").unlink()
    with pytest.raises(HarnessError, match="needed"):
        run(dataset, out)
    (dataset.image_dir / "1.png").unlink()  # nor does what cannot be made
    assert len(run(dataset, out, skip_bad=True).files) == 2

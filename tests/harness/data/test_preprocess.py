"""Preprocessing against plain OpenCV and NumPy, and everything that can be wrong with a set."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from engine.data.preprocessed import PreprocessedSet, load_preprocessed
from engine.errors import EngineError
from engine.protocol import InputSpec
from harness.bench import loading as bench_loading
from harness.bench.loading import measure
from harness.data.dataset import Dataset
from harness.data.preprocess import open_current, preprocess
from harness.data.transform import BadImageError, decode, transform
from harness.errors import HarnessError
from harness.lock import locked
from tests.support.photos import photo, reference

SPEC = InputSpec("image", (3, 96, 128), "float32")
INT8 = InputSpec("image", (3, 96, 128), "int8", 0.0207925)

# What a user runs, as a script of its own: spawn needs a main module that can be imported.
SCRIPT = """
import sys
from pathlib import Path
from engine.protocol import InputSpec
from harness.data.dataset import Dataset
from harness.errors import HarnessError
from harness.data.preprocess import preprocess

if __name__ == "__main__":
    root = Path(sys.argv[1])
    if len(sys.argv) > 2:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    dataset = Dataset("test", root / "images", root / "map.txt", None)
    spec = InputSpec("image", (3, 600, 600), "float32")
    try:
        preprocess(dataset, spec, root / "out", workers=2, overwrite=False, skip_bad=False,
                   progress=False)
    except HarnessError as error:
        print(error)
        sys.exit(2)
"""


def transformed(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    out = np.full(spec.shape, 99, spec.dtype)
    transform(image, spec, out)
    return out


def make_dataset(root: Path, images: dict[str, np.ndarray]) -> Dataset:
    (root / "images").mkdir(parents=True)
    for name, image in images.items():
        assert cv2.imwrite(str(root / "images" / name), image)
    (root / "map.txt").write_text("".join(f"{name}\n" for name in images))
    return Dataset("test", root / "images", root / "map.txt", None)


def run(
    dataset: Dataset, out_dir: Path, spec: InputSpec = SPEC, **options: bool
) -> PreprocessedSet:
    choices = {"overwrite": False, "skip_bad": False} | options
    return preprocess(dataset, spec, out_dir, workers=1, progress=False, **choices)


def write_times(out_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out_dir.glob("*.npy")}


# The transform


@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), st.integers(0)
)
@settings(max_examples=60, deadline=None)
def test_transform_is_the_reference(h: int, w: int, height: int, width: int, seed: int) -> None:
    image = photo(h, w, seed)
    out = transformed(image, InputSpec("image", (3, height, width), "float32"))
    np.testing.assert_allclose(out, reference(image, height, width), rtol=0, atol=1e-5)


def test_resize_happens_in_float() -> None:
    image = photo(97, 131)
    out = transformed(image, SPEC)
    std = np.array([0.229, 0.224, 0.225])[:, None, None]
    in_uint8 = reference(cv2.resize(image, (128, 96), interpolation=cv2.INTER_LINEAR), 96, 128)
    grey_levels = np.abs(out - in_uint8) * std * 255
    assert grey_levels.max() > 0.4
    assert (np.abs(out - reference(image, 96, 128)) * std * 255).max() < 1e-3


@pytest.mark.parametrize("scale", [0.0207925, 0.004, 1.0])
def test_int8_is_the_rounded_quotient(scale: float) -> None:
    image = photo(333, 219)
    quotient = reference(image, 96, 128).astype(np.float64) / scale
    out = transformed(image, InputSpec("image", (3, 96, 128), "int8", scale)).astype(int)
    expected = np.clip(np.rint(quotient), -127, 127)
    near_tie = np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) < 1e-2
    assert near_tie.mean() < 0.1
    np.testing.assert_array_equal(out[~near_tie], expected[~near_tie])
    assert np.abs(out - expected).max() <= 1
    if scale == 0.004:  # 2.64 / 0.004 is far outside
        assert {out.min(), out.max()} == {-127, 127}


def test_int8_ties_go_to_even() -> None:
    value = np.float32(np.float32(1) - np.float32(0.485)) / np.float32(0.229)  # red of white
    white = np.full((8, 8, 3), 255, np.uint8)
    results = {}
    for steps in (1.5, 2.5, 3.5, 4.5):
        scale = float(np.float32(value / np.float32(steps)))
        if value / np.float32(scale) == np.float32(steps):  # an exact tie in float32
            out = transformed(white, InputSpec("image", (3, 8, 8), "int8", scale))
            results[steps] = set(out[0].ravel().tolist())
    assert len(results) >= 2
    expected = {1.5: {2}, 2.5: {2}, 3.5: {4}, 4.5: {4}}
    assert results == {steps: expected[steps] for steps in results}


# Decoding


def test_decode_is_imread(tmp_path: Path) -> None:
    image = photo(61, 83)
    rgb = Image.fromarray(image[..., ::-1])
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn by 90 degrees
    rgb.save(tmp_path / "plain.jpg", quality=90)
    rgb.save(tmp_path / "progressive.jpg", quality=90, progressive=True)
    rgb.save(tmp_path / "rotated.jpg", exif=rotated)
    rgb.convert("L").save(tmp_path / "grey.jpg")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    cv2.imwrite(str(tmp_path / "deep.png"), image.astype(np.uint16) * 257)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        expected = cv2.imread(str(path))
        assert expected.dtype == np.uint8
        np.testing.assert_array_equal(decode(path.read_bytes()), expected, err_msg=path.name)
    assert decode((tmp_path / "rotated.jpg").read_bytes()).shape == (83, 61, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_the_reference_does(
    tmp_path: Path, orientation: int
) -> None:
    """The MLPerf reference calls cv2.imread(src), which turns the picture as EXIF says."""
    picture = Image.fromarray(photo(48, 80)[..., ::-1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    picture.save(path, quality=95, exif=exif)
    found = decode(path.read_bytes())
    np.testing.assert_array_equal(found, cv2.imread(str(path)))
    with Image.open(path) as stored:
        turned = np.asarray(ImageOps.exif_transpose(stored))[..., ::-1]
        as_stored = np.asarray(stored)[..., ::-1]
    assert found.shape == turned.shape
    assert np.abs(found.astype(int) - turned).mean() < 1  # two JPEG decoders
    if orientation > 1 and found.shape == as_stored.shape:
        assert np.abs(found.astype(int) - as_stored).mean() > 5


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def without_pixels(suffix: str, width: int, height: int) -> bytes:
    """A whole file whose header gives this size."""
    if suffix == ".png":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)
    if suffix == ".bmp":
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info
    jpeg = cv2.imencode(".jpg", photo(16, 16))[1].tobytes()
    frame = jpeg.index(b"\xff\xc0") + 5  # marker, length, precision; then height and width
    return jpeg[:frame] + struct.pack(">HH", height, width) + jpeg[frame + 4 :]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
@pytest.mark.parametrize("size", [(0, 16), (16, 0), (0, 0)])
def test_an_image_of_zero_size_is_bad(suffix: str, size: tuple[int, int]) -> None:
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(without_pixels(suffix, *size))


def jpeg_with_thumbnail(image: np.ndarray) -> bytes:
    """A JPEG whose first segment, like an EXIF thumbnail, holds a whole JPEG of its own."""
    thumbnail = cv2.imencode(".jpg", image[::8, ::8])[1].tobytes()
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = cv2.imencode(".jpg", image)[1].tobytes()
    return whole[:2] + segment + whole[2:]


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_images_are_found(kept: float) -> None:
    image = photo(120, 160)
    jpeg = jpeg_with_thumbnail(image)
    progressive = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    png = cv2.imencode(".png", image)[1].tobytes()
    for data in (jpeg, progressive, png):
        assert decode(data).shape == image.shape
        with pytest.raises(BadImageError, match="truncated"):
            decode(data[: int(len(data) * kept)])


def test_bytes_after_the_image_are_no_damage() -> None:
    jpeg = cv2.imencode(".jpg", photo(40, 40))[1].tobytes()
    np.testing.assert_array_equal(decode(jpeg + b"\0" * 100), decode(jpeg))


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=100, deadline=None)
def test_garbage_is_a_bad_image(data: bytes, jpeg: bool) -> None:
    with pytest.raises(BadImageError):
        decode((b"\xff\xd8\xff" if jpeg else b"") + data)


# A set


def test_set_holds_every_image_in_map_order(tmp_path: Path) -> None:
    images = {f"{name}.png": photo(50 + 7 * n, 91 - 5 * n, n) for n, name in enumerate("dbca")}
    dataset = make_dataset(tmp_path, images)
    result = preprocess(
        dataset, SPEC, tmp_path / "out", workers=2, overwrite=False, skip_bad=False, progress=True
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
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert not (tmp_path / "out" / "journal.jsonl").exists()
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
    listed = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    names = [line.split("\t")[0] for line in listed]
    assert names == ["cut.jpg", "gone.jpg", "zero.jpg", "text.jpg"]
    with pytest.raises(EngineError, match="unfinished"):
        load_preprocessed(tmp_path / "out", SPEC)
    # a folder that was a complete set is none once an image has gone bad
    good = make_dataset(tmp_path / "other", {"a.png": photo(8, 8), "b.png": photo(9, 9)})
    run(good, tmp_path / "once")
    (good.image_dir / "b.png").write_bytes(b"")
    with pytest.raises(HarnessError, match="1 of 2 images"):
        run(good, tmp_path / "once")
    with pytest.raises(EngineError, match="unfinished"):
        load_preprocessed(tmp_path / "once", SPEC)
    # restored images complete the set without doing the good ones again
    before = write_times(tmp_path / "out")
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
    with pytest.raises(HarnessError, match="nowhere not found"):
        run(dataset, tmp_path / "out")


def test_loading_is_measured_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"file per image", "one file, read", "one file, mapped"}
    figures = measure(tmp_path, InputSpec("image", (3, 8, 8), "int8", 0.02), 70, 2)
    assert figures["milliseconds_per_image"].keys() == ways
    monkeypatch.setattr(bench_loading._Reader, "__call__", lambda *_: np.ones(3, np.int8))
    with pytest.raises(HarnessError, match="one file, read loads other images"):
        measure(tmp_path, InputSpec("image", (3, 8, 8), "int8", 0.02), 70, 2)


# Faults of a run, in a process of its own


def start_script(root: Path, *arguments: str) -> subprocess.Popen[str]:
    script = root / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(root), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a shell gives it
    )


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_resumes(tmp_path: Path, kill: int) -> None:
    base = photo(700, 900)
    image_dir = tmp_path / "images"
    image_dir.mkdir()
    jpeg = cv2.imencode(".jpg", base)[1].tobytes()
    names = [f"{n}.jpg" for n in range(240)]
    for name in names:
        (image_dir / name).write_bytes(jpeg)
    (tmp_path / "map.txt").write_text("\n".join(names))
    journal = tmp_path / "out" / "journal.jsonl"
    process = start_script(tmp_path)
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 10)
    if kill == signal.SIGINT:  # Ctrl-C reaches every process of the group
        os.killpg(process.pid, kill)
    else:
        process.kill()
    # ends when every process has closed the output pipes
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("KeyboardInterrupt") == (kill == signal.SIGINT)
    assert not (tmp_path / "out" / "manifest.json").exists()
    if kill == signal.SIGINT:
        assert not list((tmp_path / "out").glob("*.tmp"))
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    finished = {f"{line['file']}.npy" for line in lines}
    assert 0 < len(finished) < 240
    before = write_times(tmp_path / "out")
    with journal.open("a") as file:
        file.write('{"file": "239.jpg", "si')  # as a crash may leave it

    result = start_script(tmp_path)
    assert result.communicate(timeout=120) == ("", "")
    after = write_times(tmp_path / "out")
    assert len(after) == 240
    assert all(after[name] == before[name] for name in finished)
    opened = load_preprocessed(tmp_path / "out", InputSpec("image", (3, 600, 600), "float32"))
    expected = reference(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), 600, 600)
    np.testing.assert_allclose(opened.load([239])[0], expected, rtol=0, atol=1e-5)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    make_dataset(tmp_path, {f"{n}.jpg": photo(700, 900, n % 2) for n in range(160)})
    process = start_script(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this kernel does not list the children of a process")
    journal = tmp_path / "out" / "journal.jsonl"
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 3)
    for child in children.read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            break
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (2, "")
    assert output.startswith("a preprocessing process died")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path) -> None:
    make_dataset(tmp_path, {f"{n}.jpg": photo(40, 50, n) for n in range(4)})
    process = start_script(tmp_path, "1000000")  # bytes per file; an image takes 4,320,128
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (2, "")
    assert output.startswith(f"cannot write {tmp_path}/out/")
    assert output.count("\n") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"journal.jsonl", "lock"}


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
    assert {path.name for path in out.iterdir()} == {"lock"}
    Usage.free += 1
    assert len(run(dataset, out).files) == 3
    Usage.free = 0  # what is there needs no room of its own
    assert len(run(dataset, out, overwrite=True).files) == 3
    (out / "1.png.npy").unlink()
    with pytest.raises(HarnessError, match="needed"):
        run(dataset, out)
    (dataset.image_dir / "1.png").unlink()  # nor does what cannot be made
    assert len(run(dataset, out, skip_bad=True).files) == 2


def test_a_set_in_the_making_is_left_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.jpg": photo(40, 50, 1)})
    with locked(tmp_path / "out"), pytest.raises(HarnessError, match="is in use by process"):
        run(dataset, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lock"}

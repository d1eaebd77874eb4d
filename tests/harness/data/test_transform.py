"""Decoding and the transform against plain OpenCV and NumPy."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from engine.protocol import InputSpec
from harness.data.transform import BadImageError, decode, transform
from tests.support.image_sets import SPEC
from tests.support.photos import photo, reference


def transformed(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    out = np.full(spec.shape, 99, spec.dtype)
    transform(image, spec, out)
    return out


# The transform


@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), st.integers(0)
)
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
        with pytest.raises(BadImageError, match=r"truncated|cannot be decoded"):
            decode(data[: int(len(data) * kept)])


JPEG = cv2.imencode(".jpg", cv2.resize(photo(8, 8), (96, 64)))[1].tobytes()
TABLES = JPEG.index(b"\xff\xdb")
MIDDLE = (JPEG.index(b"\xff\xda") + len(JPEG)) // 2
HEIGHT = JPEG.index(b"\xff\xc0") + 5


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:MIDDLE] + b"\xff\xd9",
        JPEG[:HEIGHT] + struct.pack(">H", 128) + JPEG[HEIGHT + 2 :],
        JPEG[:TABLES] + bytes(16) + JPEG[TABLES:MIDDLE] + b"\xff\xd9",
        JPEG[:MIDDLE] + bytes([170, 213, 127] * 5) + b"\xff\xd9",
    ],
    ids=["cut, end appended", "height doubled", "behind extraneous bytes", "other codes"],
)
def test_a_damaged_jpeg_with_its_end_is_found(data: bytes) -> None:
    with pytest.raises(BadImageError, match=r"damaged JPEG \(Corrupt JPEG data"):
        decode(data)


@pytest.mark.parametrize("count", [1, 16, 5000])
def test_bytes_that_the_decoder_skips_are_no_damage(count: int) -> None:
    """Of webcams, between markers; behind the end of a PNG (opencv/opencv#9477)."""
    whole = cv2.imdecode(np.frombuffer(JPEG, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decode(JPEG[:TABLES] + bytes(count) + JPEG[TABLES:]), whole)
    np.testing.assert_array_equal(decode(JPEG[:-2] + bytes(count) + JPEG[-2:]), whole)
    png = cv2.imencode(".png", whole)[1].tobytes()
    np.testing.assert_array_equal(decode(png + bytes(count)), whole)


def test_bytes_after_the_image_are_no_damage() -> None:
    jpeg = cv2.imencode(".jpg", photo(40, 40))[1].tobytes()
    np.testing.assert_array_equal(decode(jpeg + b"\0" * 100), decode(jpeg))


@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_a_bad_image(data: bytes, jpeg: bool) -> None:
    with pytest.raises(BadImageError):
        decode((b"\xff\xd8\xff" if jpeg else b"") + data)

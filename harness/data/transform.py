"""One image file to network input.

The transform is that of the MLPerf reference (``pre_process_coco_resnet34``): decode as 8-bit
BGR, BGR to RGB, float32, bilinear resize to the input size without keeping the aspect ratio,
/255, minus mean, by standard deviation, CHW. Resizing in uint8 instead is off by up to 0.75 grey
levels. Bilinear interpolation commutes with an affine map per channel, so the values are
normalised *before* the resize, by a table of 256 float32 entries over the few source pixels: the
result agrees with the reference order to float32 rounding (under 1e-5) and three passes over the
large image are saved.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.data.preprocessed import MEAN, STD
from engine.errors import one_line
from engine.protocol import InputSpec

PIXELS = 1 << 28
"""Of an image; phones have up to 200 million, and each takes 15 bytes here."""

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(PIXELS))  # read when cv2 is imported

_EXTRANEOUS = "extraneous bytes before marker"
_CORRUPT = ("Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression")
"""How libjpeg's warnings of damage begin (jerror.h)."""


class BadImageError(Exception):
    """An image that cannot be used; the text is the reason."""


class Source(NamedTuple):
    """State of an image file: size in bytes, modification time in ns, SHA-256 of its content.

    `shape` is its height and width as it was decoded; None: not known.
    """

    size: int
    mtime_ns: int
    sha256: str
    shape: tuple[int, int] | None = None


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode an image file as ``cv2.imread`` does by default.

    By default is how the MLPerf reference calls it (vision/classification_and_detection/python/
    coco.py: ``cv2.imread(src)``): grey and CMYK become BGR, alpha goes, 16 bits become 8, and an
    EXIF orientation is applied.

    Parameters
    ----------
    data
        Content of the file.

    Returns
    -------
    ndarray
        uint8 [h, w, 3], BGR.

    Raises
    ------
    BadImageError
        Empty, cut short or undecodable data, more than `PIXELS` of them, and a JPEG in which the
        decoder met an error. What is damaged and decodes without one is not noticed.
    """
    import cv2

    if not data:
        raise BadImageError("empty file")
    if data.startswith(b"\x89PNG") and b"IEND\xaeB`\x82" not in data:
        raise BadImageError("truncated PNG, no IEND chunk")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, MemoryError) as error:
        raise _too_large(error) from error
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    if image is None:
        raise BadImageError("cannot be decoded, damaged or no image")
    return image.astype(np.uint8, copy=False)


def _too_large(error: Exception) -> BadImageError:
    """What OpenCV ends with: its error, or, for want of memory, perhaps Python's."""
    said = one_line(getattr(error, "err", "")) or "not enough memory"
    too_many = "CV_IO_MAX_IMAGE" in said
    return BadImageError(f"more than {PIXELS} pixels" if too_many else f"cannot be decoded: {said}")


def _check_jpeg(data: bytes) -> None:
    """Refuse a JPEG of whose data the decoder says that they end early or are no code.

    OpenCV fills the missing part with grey and prints what libjpeg-turbo says, if that. Bytes
    between two markers (of webcams, above all) harm nothing, but hide what is said later.
    """
    found = _warning(data)
    if _EXTRANEOUS in found:
        found = _warning(_without_extraneous(data))
    if found and _EXTRANEOUS not in found:
        raise BadImageError(f"truncated or damaged JPEG ({found})")


def _warning(data: bytes) -> str:
    """First thing that libjpeg-turbo says against the data of a JPEG; empty: nothing."""
    import simplejpeg

    try:
        # for the codes alone: an eighth of the size, without colours
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except ValueError as error:
        # anything else, as a kind of file that it does not know, is for OpenCV to judge
        found = str(error)
        return found if found.startswith(_CORRUPT) else ""
    return ""


def _without_extraneous(data: bytes) -> bytes:
    """JPEG without what lies between the segments before its first scan (ITU-T T.81, B.1.1)."""
    parts, position = [data[:2]], 2
    while (start := data.find(b"\xff", position)) >= 0:
        marker = data[start + 1 : start + 2]
        position = start + 1
        if marker in (b"\x00", b"\xff", b""):  # no marker, or a fill byte before one
            continue
        position += 1 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == b"\xda":  # start of scan
            return b"".join([*parts, data[start:]])
        parts.append(data[start:position])
    return data


@lru_cache(maxsize=2)
def _tables(spec: InputSpec) -> NDArray[np.float32]:
    """[3, 256] float32: network input for each 8-bit value of the R, G and B channel."""
    value = np.arange(256, dtype=np.float32) / np.float32(255)
    mean = np.array(MEAN, np.float32)[:, None]
    std = np.array(STD, np.float32)[:, None]
    table: NDArray[np.float32] = (value - mean) / std
    return table if spec.scale is None else table / np.float32(spec.scale)


def transform(image: NDArray[np.uint8], spec: InputSpec, out: NDArray[np.generic]) -> None:
    """Turn a decoded image into network input.

    Parameters
    ----------
    image
        uint8 [h, w, 3], BGR.
    spec
        Input of shape (3, H, W).
    out
        [3, H, W] of the spec's dtype, C-contiguous; written. RGB. float32: normalised value;
        int8: normalised value / scale, rounded half to even, clipped to [-127, 127].
    """
    import cv2

    size = spec.shape[2], spec.shape[1]
    for channel, table in enumerate(_tables(spec)):
        source = cv2.LUT(cv2.extractChannel(image, 2 - channel), table)
        if spec.dtype == "float32":
            cv2.resize(source, size, dst=out[channel], interpolation=cv2.INTER_LINEAR)
        else:
            plane = cv2.resize(source, size, interpolation=cv2.INTER_LINEAR)
            np.rint(plane, out=plane)
            np.clip(plane, -127, 127, out=plane)
            np.copyto(out[channel], plane, casting="unsafe")


def read_image(path: Path) -> tuple[bytes, os.stat_result]:
    """Content and state of an image file.

    Raises
    ------
    BadImageError
        The file is missing or unreadable, or a device or pipe, which may have no end.
    """
    try:
        # without waiting for somebody to write into a pipe
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            state = os.fstat(f.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise BadImageError("not a regular file")
            return f.read(), state
    except FileNotFoundError:
        raise BadImageError("missing") from None
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", "not enough memory")
        raise BadImageError(f"cannot be read: {why}") from error


def preprocess_image(path: Path, spec: InputSpec, out: NDArray[np.generic]) -> Source:
    """Read, decode and transform one image file.

    Returns
    -------
    Source
        State of the file that was read.

    Raises
    ------
    BadImageError
        The file is missing, unreadable or damaged.
    """
    import cv2

    data, state = read_image(path)
    try:
        image = decode(data)
        transform(image, spec, out)
    except (cv2.error, MemoryError) as error:
        raise _too_large(error) from error
    shape = image.shape[0], image.shape[1]
    return Source(state.st_size, state.st_mtime_ns, sha256(data).hexdigest(), shape)

"""Files among the images that are no images to take, in a process of their own that may hang."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import pytest

PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np
from engine.protocol import InputSpec
from harness.data.transform import BadImageError, preprocess_image
import cv2

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
spec = InputSpec("image", (3, 64, 64), "float32")
try:
    preprocess_image(Path(sys.argv[1]), spec, np.empty(spec.shape, np.float32))
except BadImageError as error:
    print(error)
"""


def png(side: int, rows: int = 1) -> bytes:
    """Grey PNG of one bit a pixel, with the data of its first rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((side // 8 + 1) * rows))
    parts = chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "memory", "message"),
    [
        (None, 8 << 30, "not a regular file"),
        (png(30_000), 8 << 30, "more than 268435456 pixels"),
        (png(16_000), 1200 << 20, "cannot be decoded"),
        (png(10_000, 10_000), 1200 << 20, "cannot be decoded"),
    ],
    ids=["a pipe", "30000 x 30000", "no memory for the image", "no memory for the input"],
)
def test_one_line_of_a_file(tmp_path, content, memory, message) -> None:
    path = tmp_path / "image.png"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, str(memory)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(message)
    assert done.stdout.count("\n") == 1

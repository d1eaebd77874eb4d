"""One preprocessed image as a .npy file.

Every file of a set has the same header, so it is written and checked as bytes, and an image is
read straight into its place in a batch.
"""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.protocol import InputSpec
from engine.support.files import write_atomically


@lru_cache(maxsize=2)
def _header(spec: InputSpec) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream,
        {
            "descr": np.lib.format.dtype_to_descr(np.dtype(spec.dtype)),
            "fortran_order": False,
            "shape": spec.shape,
        },
    )
    return stream.getvalue()


def npy_path(directory: Path, name: str) -> Path:
    """Where the image of this file name lies in a set."""
    return directory / f"{name}.npy"


def npy_bytes(spec: InputSpec) -> int:
    """Size of the file of an image of this spec."""
    return len(_header(spec)) + int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize


def npy_time(path: Path, spec: InputSpec) -> int | None:
    """Modification time in ns of a file that is as long as an image of this spec; None: it is not.

    A quick check.
    """
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns if state.st_size == npy_bytes(spec) else None


def is_npy(path: Path, spec: InputSpec) -> bool:
    """Tell whether a file exists and holds, by header and size, an image of this spec."""
    if npy_time(path, spec) is None:
        return False
    with path.open("rb") as file:
        return file.read(len(_header(spec))) == _header(spec)


def write_npy(path: Path, image: NDArray[np.generic], spec: InputSpec) -> None:
    """Write a C-contiguous image of the spec's shape and dtype, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _header(spec), image.data.cast("B"))


def read_npy(path: Path, spec: InputSpec, out: NDArray[np.generic]) -> int | None:
    """Read an image into `out`, a C-contiguous array of the spec's shape and dtype.

    Returns
    -------
    int or None
        Modification time of the file in ns, after it was read. None when the file holds anything
        else; `out` is undefined then.
    """
    header = _header(spec)
    with path.open("rb", buffering=0) as file:
        if file.read(len(header)) != header or file.readinto(out.data.cast("B")) != out.nbytes:
            return None
        return os.fstat(file.fileno()).st_mtime_ns

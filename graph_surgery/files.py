"""Reading and writing ONNX files, with the data that they keep in files beside them.

A model that had data outside, or is too large for one protobuf, is written as two files: MODEL.onnx
and, with all its large initialisers, MODEL.onnx.HASH.data. HASH is of the data, so that no model
ever reads another's: the data comes first, under a name that no older MODEL.onnx knows, then the
model, and what the older one had goes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graph_surgery.errors import SurgeryError
from graph_surgery.kinds import other_kind
from graph_surgery.limits import check_limits
from graph_surgery.protobuf import (
    SMALL,
    data_file,
    fits,
    is_outside,
    is_packed,
    move_out,
    one_line,
    set_location,
    size,
)


def load(path: Path) -> onnx.ModelProto:
    """Read a model and check it.

    Large initialisers in other files stay there, and the model says where; see
    `graph_surgery.protobuf.is_outside`.

    Raises
    ------
    SurgeryError
        When the file, or one with its data, is missing or truncated, or it is no ONNX model, or an
        invalid one.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, UnicodeDecodeError) as error:
        what = other_kind(path) or ", or a truncated one"
        raise SurgeryError(f"{path}: not an ONNX model{what}") from error
    except OSError as error:
        raise SurgeryError(f"{error.filename or path}: cannot read: {error.strerror}") from error
    if not model.graph.node:
        what = other_kind(path) or ", or one without nodes"
        raise SurgeryError(f"{path}: not an ONNX model{what}")
    try:
        check_limits(model)
    except SurgeryError as error:
        raise SurgeryError(f"{path}: {error}") from error
    large = [tensor for tensor in model.graph.initializer if _stays_outside(tensor)]
    try:
        for tensor in large:  # what is left is small
            tensor.data_location = onnx.TensorProto.DEFAULT
        onnx.load_external_data_for_model(model, str(path.parent))
        for tensor in large:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            _find(tensor, path.parent)
    except OSError as error:
        raise SurgeryError(f"{error.filename or path}: cannot read: {error.strerror}") from error
    except (ValueError, onnx.checker.ValidationError) as error:
        raise SurgeryError(f"{path}: cannot read its data: {one_line(error)}") from error
    try:
        # as a file: what is large is not read
        onnx.checker.check_model(os.fspath(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise SurgeryError(f"{path}: not a valid ONNX model: {one_line(error)}") from error
    return model


def _stays_outside(tensor: onnx.TensorProto) -> bool:
    return is_outside(tensor) and size(tensor) > SMALL and not is_packed(tensor)


def _find(tensor: onnx.TensorProto, folder: Path) -> None:
    """Make sure that the values of a tensor outside are there; make their path absolute."""
    wanted = size(tensor)
    for entry in tensor.external_data:
        if entry.key == "length" and int(entry.value) != wanted:
            raise ValueError(f"{tensor.name!r} has {entry.value} bytes of data, not {wanted}")
        if entry.key == "location":
            entry.value = str(folder.resolve() / entry.value)
    path, offset = data_file(tensor)
    if path.stat().st_size < offset + wanted:
        raise ValueError(f"{path.name} ends before the values of {tensor.name!r}: truncated")


def save(model: onnx.ModelProto, path: Path, *, overwrite: bool = True) -> bool:
    """Write a model, whole or not at all.

    Parameters
    ----------
    overwrite
        Whether another file may be replaced.

    Returns
    -------
    Whether it was written: a file that holds the very same is left.

    Raises
    ------
    SurgeryError
        When the file cannot be written, or another one is there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of no other process
    values = temporary.with_suffix(".data.tmp")
    data = None
    try:
        if not fits(model) or any(map(is_outside, model.graph.initializer)):
            with values.open("w+b") as file:
                model = move_out(model, file)
            data = path.with_name(f"{path.name}.{_sha256(values)[:16]}.data")
            set_location(model, data.name)
        content = model.SerializeToString(deterministic=True)
        if path.exists():
            same = path.read_bytes() == content
            if same and (data is None or (data.is_file() and _sha256(data) == _sha256(values))):
                return False
            if not (same or overwrite):
                raise SurgeryError(
                    f"{path}: exists already, and is another: remove it or pass --force"
                )
        own = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{16}}\.data")
        before = {name for name in _data_names(path) if own.fullmatch(name)}
        if data is not None:
            values.replace(data)
        temporary.write_bytes(content)
        temporary.replace(path)
        for name in before:
            if not any(name in _data_names(one) for one in (path, *path.parent.glob("*.onnx"))):
                path.with_name(name).unlink(missing_ok=True)
    except OSError as error:
        raise SurgeryError(f"{path}: cannot write it: {error.strerror}") from error
    finally:
        for left in (temporary, values):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data_names(path: Path) -> set[str]:
    """Files with large initialisers of the model that is at `path`, if one is, as it names them."""
    with contextlib.suppress(DecodeError, OSError, KeyError, ValueError):
        old = onnx.load(path, load_external_data=False)
        return {str(data_file(tensor)[0]) for tensor in filter(is_outside, old.graph.initializer)}
    return set()


def data_files(model: onnx.ModelProto) -> set[Path]:
    """Files with the large initialisers of a model that `load` read."""
    return {data_file(tensor)[0] for tensor in filter(is_outside, model.graph.initializer)}


def check_output(output: Path, read: Iterable[Path]) -> None:
    """Refuse to write what is read, or where nothing can be written: before the work.

    Parameters
    ----------
    read
        Files that the output is made from.

    Raises
    ------
    SurgeryError
        Says which.
    """
    if not output.parent.is_dir():
        raise SurgeryError(f"{output.parent}: no such folder to write {output.name} to")
    if output.is_dir():
        raise SurgeryError(f"{output}: cannot write it: a folder")
    if not os.access(output.parent, os.W_OK):
        raise SurgeryError(f"{output.parent}: cannot be written to")
    if output.exists() and any(path.exists() and output.samefile(path) for path in read):
        raise SurgeryError(f"{output}: is the input; give the output another name")

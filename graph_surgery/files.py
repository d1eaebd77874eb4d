"""Reading and writing ONNX files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graph_surgery.errors import SurgeryError
from graph_surgery.protobuf import one_line


def load(path: Path) -> onnx.ModelProto:
    """Read a model with its external data and check it.

    Raises
    ------
    SurgeryError
        When the file is missing, truncated, no ONNX model, or an invalid one.
    """
    try:
        model = onnx.load(path)
    except (DecodeError, UnicodeDecodeError) as error:
        raise SurgeryError(f"{path}: not an ONNX model, or a truncated one") from error
    except OSError as error:
        raise SurgeryError(f"{error.filename or path}: cannot read: {error.strerror}") from error
    except (ValueError, onnx.checker.ValidationError) as error:
        raise SurgeryError(f"{path}: cannot read it: {one_line(error)}") from error
    if not model.graph.node:
        raise SurgeryError(f"{path}: not an ONNX model, or one without nodes")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise SurgeryError(f"{path}: not a valid ONNX model: {one_line(error)}") from error
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file, under a temporary name first.

    Raises
    ------
    SurgeryError
        When the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of no other process
    try:
        temporary.write_bytes(model.SerializeToString())
        temporary.replace(path)
    except OSError as error:
        raise SurgeryError(f"{path}: cannot write it: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

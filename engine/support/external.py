"""Data that ONNX files keep in other files, found without onnx, which servers lack."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.support.files import file_sha256

MESSAGES: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        10: "TensorProto",
        6: "GraphProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""Fields of ONNX's messages behind which tensors lie: number to message (onnx.proto)."""

_KEY, _VALUE = 1, 2  # of a StringStringEntryProto


def data_files(model: Path) -> list[str]:
    """Files with data of an ONNX file, sorted: their paths from its folder. None of another file.

    Raises
    ------
    OSError
        When the ONNX file cannot be read.
    """
    if not model.stat().st_size:
        return []
    with model.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return sorted(set(_locations(content, "ModelProto")))
    except (IndexError, ValueError):
        return []


def model_sha256(model: Path) -> str:
    """SHA-256 of an ONNX file, in hex; of one with data in other files, over those as well.

    Raises
    ------
    OSError
        When a file cannot be read.
    """
    others = data_files(model)
    if not others:
        return file_sha256(model)
    lines = [file_sha256(model), *(f"{name} {file_sha256(model.parent / name)}" for name in others)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _locations(data: memoryview, message: str) -> Iterator[str]:
    """Values of ``location`` in a message of `MESSAGES`."""
    for number, part in _fields(data):
        inner = MESSAGES[message].get(number)
        if inner == "StringStringEntryProto":
            entry = {key: bytes(text) for key, text in _fields(part)}
            if entry.get(_KEY) == b"location":
                yield entry.get(_VALUE, b"").decode()
        elif inner is not None:
            yield from _locations(part, inner)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Numbers and contents of the fields of a message that are texts, bytes or messages.

    After protobuf's encoding, https://protobuf.dev/programming-guides/encoding.
    """
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        match key & 7:
            case 0:
                _, at = _number(data, at)
            case 1:
                at += 8
            case 2:
                size, at = _number(data, at)
                if at + size > len(data):
                    raise ValueError("truncated")
                yield key >> 3, data[at : at + size]
                at += size
            case 5:
                at += 4
            case _:
                raise ValueError("no protobuf")


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """Read a variable-length number; it, and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at

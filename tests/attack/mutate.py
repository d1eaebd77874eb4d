"""Damage that files may have, at random."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

WORDS = [
    *(b"0", b"-1", b"1e400", b"NaN", b"inf", b"true", b"null", b'""', b"[]", b"{}", b"9" * 400),
    *(b"[" * 300, b"2147483648", b"18446744073709551616", b"../../x", b"/etc/passwd", b"\x1b[31m"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", "\u2028".encode(), "\x85".encode(), b"\r", b"\0", b"\n\n"),
]


NUMBERS = [0, 1, -1, -3, 2, 99, 2**31 - 1, -(2**31)]


def mutate_model(rng: np.random.Generator, content: bytes) -> bytes:
    """One to three fields of an ONNX model changed, lost or doubled, of which it stays one."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(int(rng.integers(1, 4))):
        places = [
            (message, *known) for message in _messages(model) for known in message.ListFields()
        ]
        message, field, value = places[rng.integers(len(places))]
        many = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
        if many and rng.random() < 0.5:
            at = int(rng.integers(len(value)))
            if rng.random() < 0.5:
                del value[at]
            else:
                value.extend([value[at]])
        elif field.message_type is not None or rng.random() < 0.2:
            message.ClearField(field.name)
        else:
            one = value[0] if many else value
            new: Any = NUMBERS[rng.integers(len(NUMBERS))]
            if isinstance(one, (str, bytes)):
                new = WORDS[rng.integers(len(WORDS))]
                new = new if isinstance(one, bytes) else new.decode(errors="replace")
            elif isinstance(one, float):
                new = float(rng.choice([0.0, -1.0, 1e38, np.inf, np.nan]))
            with contextlib.suppress(ValueError, TypeError):  # not of this field
                if many:
                    value[int(rng.integers(len(value)))] = new
                else:
                    setattr(message, field.name, new)
    return bytes(model.SerializeToString())


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if hasattr(value, "__len__") else [value]:
                yield from _messages(one)


def mutate(rng: np.random.Generator, content: bytes) -> bytes:
    """One to three changes of bytes or of values."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(data) + 1))
        span = int(min(len(data) - at, rng.choice([1, 4, 30, 1000])))
        match int(rng.integers(7)):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + span]
            case 2:
                data[at:at] = data[at : at + span]
            case 3:
                data[at : at + span] = rng.bytes(span)
            case 4:
                data[at : at + span] = bytes(span)
            case 5:
                data[at : at + min(span, 4)] = WORDS[rng.integers(len(WORDS))]
            case 6:  # a whole value of a text
                end = next((i for i in range(at, len(data)) if data[i] in b",}]\n"), len(data))
                start = max(data.rfind(mark, 0, at) for mark in (b":", b",", b"=", b"[")) + 1
                data[start:end] = WORDS[rng.integers(len(WORDS))]
    return bytes(data)

"""What a file is that was given as a model and is none, so that a message can say what to do."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

_HEAD = 4096

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"RIFF")


def other_kind(path: Path) -> str:
    """Say what a file that is no model is by its first bytes, as `` but a text``; empty: unknown.

    Parameters
    ----------
    path
        A file that was tried as a model already; one that cannot be read is unknown.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    kinds = {
        " but an empty file": not head,
        f" but a checkpoint: {_export(path)} make a model of it": _is_checkpoint(head),
        " but an image": head.startswith(_IMAGES),
        " but a pointer of Git LFS to a file that was not fetched: git lfs pull": head.startswith(
            b"version https://git-lfs"
        ),
        " but a text": _is_text(head),
    }
    return next((kind for kind, it_is in kinds.items() if it_is), "")


def _export(path: Path) -> str:
    """Commands that make a model of a checkpoint, to be copied."""
    stem = f"{path.stem}-exported" if path.suffix == ".onnx" else path.stem
    weights, exported, model = (quote(str(p)) for p in (path, f"{stem}.onnx", f"{stem}.nms.onnx"))
    return f"export-onnx --weights {weights} -o {exported} and graph-surgery nms {exported} {model}"


def _is_checkpoint(head: bytes) -> bool:
    archive = head.startswith(b"PK\x03\x04") and b"data.pkl" in head
    pickle = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    size = int.from_bytes(head[:8], "little")  # of the header of safetensors
    return archive or pickle or (0 < size < 2**32 and head[8:10] == b'{"')


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", errors="ignore")
    whole = len(text.encode()) > len(head) - 4  # its last character may be cut
    return whole and all(c.isprintable() or c in "\n\r\t" for c in text)

"""What has arrived of a file: its bytes in ``NAME.part``, and in ``NAME.part.json`` which version.

ETag and Last-Modified (RFC 9110) tell the versions apart, so that a later request asks for the rest
of that one only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import EngineError
from engine.support.documents import read_as
from engine.support.files import write_atomically


@dataclass(frozen=True)
class Version:
    """Which version of which file a part belongs to; `size` is that of the whole file."""

    url: str
    size: int | None
    etag: str | None
    last_modified: str | None

    @property
    def tag(self) -> str | None:
        """A strong ETag: the one validator that no other version can have."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    @property
    def validator(self) -> str | None:
        """What If-Range takes: a strong ETag or a date (RFC 9110, section 13.1.5)."""
        return self.tag or self.last_modified

    def continued_by(self, rest: Version) -> bool:
        """Whether an answer with a range of bytes is of this version; it repeats an ETag."""
        dates = (self.last_modified, rest.last_modified)
        same = self.etag == rest.etag and (None in dates or dates[0] == dates[1])
        return same and self.size == rest.size


class Part:
    """The bytes of a file that have arrived so far, in `path`, and the version they are of."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self, url: str, *, checked: bool) -> Version | None:
        """The version of the part, if it is one of `url` that can be continued; else None.

        Without an ETag only where the whole is `checked` by its hash: a date has whole seconds.
        """
        try:
            found = read_as(Version, self._note)
        except EngineError:
            return None
        validator = found.validator if checked else found.tag
        if found.url != url or validator is None or found.size is None:
            return None
        return found if 0 < self.size <= found.size else None

    def begin(self, version: Version) -> None:
        """Start anew, with bytes of this version."""
        self.discard()  # first the bytes, then the note: never old bytes under a new note
        write_atomically(self._note, json.dumps(asdict(version)).encode())

    def discard(self) -> None:
        """Forget what has arrived."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        """Give the whole file its name."""
        self.path.replace(target)
        self._note.unlink(missing_ok=True)

"""Room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness.errors import HarnessError


def require_space(folder: Path, needed: int) -> None:
    """Raise HarnessError unless so many bytes are free on the disk of an existing folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HarnessError(
            f"{folder}: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free on this disk; "
            "make room or take another folder, as with BUILD_DIR"
        )

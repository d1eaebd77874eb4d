"""What several test modules share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ARGUMENTS`` in the checkout; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done

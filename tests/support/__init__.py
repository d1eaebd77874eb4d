"""What several test modules share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


def attempt(
    *words: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` with the checkout's packages; it may end in any way."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ARGUMENTS`` in the checkout; it must end well."""
    done = attempt("-m", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done

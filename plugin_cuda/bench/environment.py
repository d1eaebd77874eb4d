"""By what a figure was made: machine, GPU, versions, sources."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_ROOM = Path(__file__).resolve().parent.parent


def environment() -> dict[str, object]:
    """Describe this machine, its first GPU, the packages and the state of the sources."""
    import torch

    names = ("torch", "torchvision", "cupy-cuda13x", "numpy")
    status = _output("git", "status", "--porcelain")
    commit = _output("git", "rev-parse", "HEAD")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cpu": _cpu(),
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in names}},
        "commit": commit and commit + ("-dirty" if status else ""),
        "kernel_sources_sha256": _sources_sha256(),
        "command": " ".join(["python -m plugin_cuda.bench", *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    """First line of what a command prints; None where it fails."""
    try:
        done = subprocess.run(
            command, cwd=_ROOM, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _sources_sha256() -> str:
    """Hash of the header and the kernels: a checkout without git knows them, too."""
    digest = hashlib.sha256()
    for path in sorted([*_ROOM.glob("include/*.h"), *_ROOM.glob("src/*.cu*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

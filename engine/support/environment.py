"""Where and by what a figure was made: machine, commit, command, time."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_STAND_INS = {
    "onnxruntime": ("onnxruntime-gpu",),
    "opencv-python-headless": (
        "opencv-python",
        "opencv-contrib-python-headless",
        "opencv-contrib-python",
    ),
}
"""Distributions that hold the same module."""


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Name of the first NVIDIA GPU, as ``NVIDIA A100-SXM4-80GB``; None without one.

    The driver's own files say it without any library; where a container hides them, nvidia-smi.
    """
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    names = (output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").split("\n")
    return names[0].strip() or None


def output_of(*command: str, folder: Path | None = None) -> str | None:
    """What a command prints; None where it fails or does not end within 20 seconds."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """Git commit of the checkout that this file belongs to; None outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        return output_of("git", *arguments, folder=here.parent)

    # an installed copy may lie below the checkout of something else
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return head and head + ("-dirty" if git("status", "--porcelain") else "")


def distribution(name: str) -> tuple[str, str | None]:
    """Name and version of an installed distribution, or of one that stands in for it.

    The version is None where neither is installed, or their metadata are damaged.
    """
    for one in (name, *_STAND_INS.get(name, ())):
        try:
            version: str | None = metadata.version(one)
        except (metadata.PackageNotFoundError, KeyError):
            continue
        if version is not None:
            return one, version
    return name, None


def versions(*names: str) -> dict[str, str | None]:
    """Versions of installed packages; see `distribution`."""
    return {name: distribution(name)[1] for name in names}


def now() -> str:
    """Return this moment, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """Return the command that runs, as a shell takes it, with the program's bare name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = [Path(sys.argv[0]).name]
    if spec is not None and Path(sys.argv[0]).suffix == ".py":  # python -m
        name = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*name, *sys.argv[1:]])


def circumstances(*packages: str) -> dict[str, object]:
    """Where and by what a measurement is made: the head of every bench's document."""
    return {
        "commit": commit(),
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_count(),
        "gpu": gpu_name(),
        "load_average": os.getloadavg()[0],
        "versions": versions(*packages),
    }

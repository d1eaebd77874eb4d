"""``python -m tests.attack.kills COUNT [SEED]``: SIGKILL while commands write, counted.

Each command is run to its end once, then killed COUNT times at random moments, half of them in the
last third of its time, in which most is written. Afterwards no file may be half of what it is under
a name that says that it is whole, and a folder that is renamed into place has all its files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.transform import BadImageError, decode
from harness.errors import HarnessError
from harness.make.system_config import read_config_file
from tests.support import ROOT

MODEL = "build/onnx/ssd-resnet34-demo.nms.onnx"
VAL, ANNOTATIONS = "demo/data/val", "demo/data/annotations/instances_val.json"

PROGRAM = """
import sys
import harness.make.tune
from harness.cli.main import main
harness.make.tune.SERVER_QUERIES = 20  # else its trials take minutes, in which nothing is written
harness.make.tune._LONGEST_S = 1.0
sys.argv[0] = "harness"
main()
"""


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes
    ----------
    words
        Its words.
    folder
        Folder that appears whole; None: its files come one by one.
    later
        Files that come into it after that.
    """

    words: tuple[str, ...]
    folder: str | None = None
    later: tuple[str, ...] = ()


COMMANDS = {
    "predict": Command(("predict", MODEL, VAL, "-o", "out", "--score", "0.05")),
    "dataset add": Command(
        ("dataset", "add", "own", "--images", VAL, "--annotations", ANNOTATIONS)
    ),
    "compliance": Command(
        ("compliance", "TEST01", MODEL, "--base", "logs"),
        "logs/box/ssd-resnet34/Offline/TEST01",
        ("verify_accuracy.txt", "verify_performance.txt", "compliance.json"),
    ),
    "submission": Command(
        ("submission", "logs", "--submitter", "Acme", "-o", "tree"), "tree/open/Acme"
    ),
    "tune": Command(
        (
            *("tune", "--benchmark", "ssd-resnet34-demo", "--seconds", "0.1", "--max-batch", "2"),
            *("-o", "tuned.toml"),
        )
    ),
}


def prepare(place: Path) -> None:
    """Make a small benchmark with a model, images and runs, on which every command works."""
    from safetensors.torch import save_file

    from export.ssd_resnet34.config import SSDConfig
    from tests.support.random_model import random_model
    from tests.support.small_benchmark import small_benchmark

    model = random_model(SSDConfig(image_size=400, width=4))
    checkpoint = place / "small.safetensors"
    save_file(model.state_dict(), checkpoint, {"ssd_config": model.config.to_json()})
    small_benchmark(place, checkpoint)
    run = ("run", MODEL, "--dataset", "demo", "--log-dir", "logs", "--system", "box")
    for words in (
        COMMANDS["tune"].words,  # which makes the model before its trials
        ("preprocess", MODEL, "--dataset", "demo"),
        (
            *run,
            "--test_mode",
            "AccuracyOnly,PerformanceOnly",
            "--min-duration",
            "0.2",
            "--min-queries",
            "1",
        ),
    ):
        done = _start(place, words)
        said = done.communicate()[0]
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {said}")
    (place / "tuned.toml").unlink()


def _start(place: Path, words: tuple[str, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BUILD_DIR": "build"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def half_files(folder: Path, before: Mapping[str, bytes]) -> dict[str, str]:
    """Files, by their path in a folder, that are not whole, and why; not those as they were."""
    return {
        name: reason
        for name in names_below(folder)
        if not _is_temporary(name)
        and before.get(name) != (folder / name).read_bytes()
        and (reason := _fault(folder / name)) is not None
    }


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their path in it."""
    return {name: (folder / name).read_bytes() for name in names_below(folder)}


def names_below(folder: Path) -> set[str]:
    """Paths in a folder of all its files."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _is_temporary(name: str) -> bool:
    return any(part.endswith((".tmp", ".partial")) for part in Path(name).parts)


def _fault(path: Path) -> str | None:
    content = path.read_bytes()
    try:
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".toml":
            read_config_file(path)
        elif path.suffix == ".jpg":
            decode(content)
        elif not content.endswith(b"\n"):
            return "ends within a line"
    except (ValueError, HarnessError, BadImageError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def kill(
    place: Path, name: str, count: int, rng: np.random.Generator, say: Callable[[str], None]
) -> Counter[str]:
    """Kill a command in copies of a prepared place; counts of ``killed``, ``done``, ``WRONG``."""
    command, before = COMMANDS[name], contents(place)
    with _copy(place) as copy:
        begin = time.monotonic()
        process = _start(copy, command.words)
        said = process.communicate()[0]
        seconds = time.monotonic() - begin
        if process.returncode not in (0, 1):  # a compliance test may fail
            raise RuntimeError(f"{name}: {said}")
        no_file = half_files(copy, before)  # LoadGen leaves empty ones, too
        complete = set() if command.folder is None else names_below(copy / command.folder)
    counts: Counter[str] = Counter()
    for number in range(count):
        with _copy(place) as copy:
            process = _start(copy, command.words)
            try:
                process.wait(seconds * rng.uniform(2 / 3 if number % 2 else 0, 1))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
            wrong = {k: why for k, why in half_files(copy, before).items() if k not in no_file}
            if command.folder and (copy / command.folder).exists():
                missing = complete - names_below(copy / command.folder) - set(command.later)
                wrong |= dict.fromkeys(missing, f"not in {command.folder}")
            kind = "killed" if process.returncode < 0 else "done"
            counts["WRONG" if wrong else kind] += 1
            for one, why in wrong.items():
                say(f"{name} {number}: {one}: {why}")
    return counts


class _copy:  # noqa: N801 - a context, as tempfile's
    """A copy of a folder, for as long as it is used."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def __enter__(self) -> Path:
        copy = Path(self._folder.name) / "place"
        shutil.copytree(self._place, copy, symlinks=True)
        return copy

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def attack(count: int, seed: int, say: Callable[[str], None]) -> Iterator[tuple[str, Counter[str]]]:
    """Kill every command as many times; the counts of each."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in COMMANDS:
            yield name, kill(Path(folder), name, count, rng, say)


def main() -> None:
    """Kill, print the counts; exit code 1 where a file was half."""

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201 - it is a program

    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**32
    say(f"kills, seed {seed}")
    total: Counter[str] = Counter()
    for name, found in attack(count, seed, say):
        total += found
        say(f"{name:13} " + "  ".join(f"{kind} {n:4}" for kind, n in sorted(found.items())))
    say(f"{sum(total.values())} kills, {total['WRONG']} wrong")
    sys.exit(total["WRONG"] > 0)


if __name__ == "__main__":
    main()

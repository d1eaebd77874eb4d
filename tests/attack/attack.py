"""``python -m tests.attack MINUTES [SEED]``: random damage and random cases, counted.

Every outcome must be a right result or one line of our errors; anything else is shown with the
number that makes it again: ``python -m tests.attack 0 SEED NAME NUMBER``.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

LIMIT = 60.0
"""Seconds that a case may take."""
MEMORY = 12 << 30


def attempt(seed: int, name: str, number: int, content: Mapping[str, bytes]) -> str:
    """Run a case: ``right``, ``refused``, ``left out``, or what is wrong with the outcome."""
    from engine.errors import EngineError
    from export.errors import ExportError
    from graph_surgery.errors import SurgeryError
    from harness.data.transform import BadImageError
    from harness.errors import HarnessError
    from tests.attack.cases import ORACLES, TARGETS
    from tests.attack.mutate import mutate, mutate_model

    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    with tempfile.TemporaryDirectory() as folder:
        try:
            if name in ORACLES:
                return "right" if ORACLES[name](rng, Path(folder)) else "left out"
            (target,) = (one for one in TARGETS if one.name == name)
            path = Path(folder, "file")
            given = content[name]
            if number:  # the first case is the file as it is
                change = mutate_model if target.is_model and rng.random() < 0.8 else mutate
                given = change(rng, given)
            path.write_bytes(given)
            target.read(path)
        except (EngineError, ExportError, HarnessError, SurgeryError, BadImageError) as error:
            if not number:
                return f"a valid file is refused: {error}"
            # 'export' lists what does not fit, a line each
            lines = str(error).count("\n") == 0 or isinstance(error, ExportError)
            return "refused" if lines else f"more than one line: {error}"
        except BaseException:
            return traceback.format_exc()
    return "right"


def _work(line: Connection) -> None:
    from tests.attack.cases import TARGETS

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders say there what they are given
    content = {target.name: target.content() for target in TARGETS}
    line.send(None)
    while True:
        line.send(attempt(*line.recv(), content))


class Worker:
    """A process that runs cases; one that hangs or dies is replaced."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._line.recv()

    def run(self, seed: int, name: str, number: int) -> tuple[str, bool]:
        """Outcome of a case, and whether the process lives."""
        self._line.send((seed, name, number))
        try:
            if self._line.poll(LIMIT):
                return self._line.recv(), True
        except EOFError:
            self._process.join()
            return f"the process ended with {self._process.exitcode}", False
        self.end()
        return f"no end in {LIMIT:g} s", False

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()


def attack(minutes: float, seed: int, say: Callable[[str], None]) -> dict[str, Counter[str]]:
    """Run cases of all kinds in turns; the counts of their outcomes by kind."""
    from tests.attack.cases import ORACLES, TARGETS

    names = [*(target.name for target in TARGETS), *ORACLES]
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    end, number, worker = time.monotonic() + 60 * minutes, 0, Worker()
    while number == 0 or time.monotonic() < end:
        for name in names:
            outcome, lives = worker.run(seed, name, number)
            kind = outcome if outcome in ("right", "refused", "left out") else "WRONG"
            counts[name][kind] += 1
            if kind == "WRONG":
                say(f"{seed} {name} {number}: {outcome}")
            if not lives:
                worker = Worker()
        number += 1
    worker.end()
    return counts


def main() -> None:
    """Attack, print the counts; exit code 1 where an outcome was wrong."""

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201 - it is a program

    if len(sys.argv) == 5:
        seed, name, number = int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
        say(Worker().run(seed, name, number)[0])
        return
    minutes = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**32
    say(f"seed {seed}")
    counts = attack(minutes, seed, say)
    for name, found in counts.items():
        said = "  ".join(f"{kind} {count:6}" for kind, count in sorted(found.items()))
        say(f"{name:13} {said}")
    total = sum(sum(found.values()) for found in counts.values())
    wrong = sum(found["WRONG"] for found in counts.values())
    say(f"{total} cases, {wrong} wrong")
    sys.exit(wrong > 0)

"""Which of cuDNN's kernels is fastest for every layer and batch size: found by trying, kept.

A cache file for each GPU model and version of cuDNN and its frontend holds the fastest plan of
every shape, serialised, and what won where there was another way to run a layer, so that the next
load neither compiles nor measures and runs the same kernels.

At the largest batch everything is tried that cuDNN's heuristics advise and, for layers with a good
share of the operations, every kernel of the engine that they advise first: on one H100 this halved
the time of a convolution of 64 channels. Smaller batches try what won there and what is advised;
so does a largest batch of which half or more is known already.

One engine at a time searches (`Turn`), in threads and in processes: two that measure side by side
disturb each other, on one GPU, and the second finds in the cache what the first has found.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

from pydantic import Field

from engine.backends.cudnn.plans import (
    Choice,
    CompiledPlan,
    ConvShape,
    choices,
    compile_all,
)
from engine.errors import EngineError
from engine.support.documents import checked, read_as
from engine.support.files import write_atomically
from engine.support.locks import lock

_LOG = logging.getLogger(__name__)

HEAVY = 0.003
"""Share of a network's operations from which on a layer is worth every kernel."""

SEARCH = 2
"""Changes with what is tried and how it is measured: a cache of another search is no use."""

_KEPT = 4
"""Winners that are remembered, for smaller batches to try."""

_ADVISED = 3
"""Kernels of the heuristics that a smaller batch tries."""

_NEAR = 2
"""How many times the images of a known batch a largest batch may have to try what won there."""

Measure = Callable[[ConvShape, Sequence[CompiledPlan]], list[float]]
"""Milliseconds of plans of one shape; infinite for one that does not run."""

Progress = Callable[[int, int], None]

Keep = Callable[[Mapping["ConvShape", "Tuned"]], None]
"""Is given what was found, as soon as it is worth keeping."""


@dataclass(frozen=True)
class Tuned:
    """The fastest plan of a shape.

    Attributes
    ----------
    plan
        The plan.
    milliseconds
        Its time when it was measured.
    ranking
        The fastest choices, itself first.
    """

    plan: CompiledPlan
    milliseconds: float
    ranking: tuple[Choice, ...]


@dataclass(frozen=True)
class _Entry:
    """A `Tuned` in a cache: choices as engine and knobs, the plan compressed, in base 85."""

    milliseconds: float
    ranking: Annotated[tuple[tuple[int, Mapping[str, int]], ...], Field(min_length=1)]
    workspace_bytes: Annotated[int, Field(ge=0)]
    plan: str


@dataclass(frozen=True)
class _Cache:
    """Content of a file: an `_Entry` by shape, the name of a winner by key; some may be damaged."""

    machine: list[str]
    plans: dict[str, Any] = field(default_factory=dict)
    winners: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What plans are made for: GPU model, cuDNN's version, its frontend's version."""

    gpu: str
    cudnn: str
    frontend: str


def cache_path(machine: Machine) -> Path:
    """Where the tuning of a machine is kept."""
    words = f"{machine.gpu} cudnn {machine.cudnn} frontend {machine.frontend}"
    name = "".join(c if c.isalnum() or c == "." else "-" for c in words)
    return Path(os.environ.get("BUILD_DIR") or "build") / "engines" / "cudnn" / f"{name}.json"


class Turn:
    """The right to search for what a cache lacks, which one engine has at a time.

    Not the lock under which the file is written (`save_cache`), which is taken and left while this
    is held, and never the other way round: so nobody waits for a circle.

    Parameters
    ----------
    path
        The cache.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}.search.lock")
        self._file: TextIO | None = None

    def take(self) -> bool:
        """Wait for it; the kernel takes it back when its holder's process ends.

        Returns
        -------
        bool
            Whether it was taken now: others may have added to the cache meanwhile.

        Raises
        ------
        EngineError
            When the file cannot be made or locked.
        """
        if self._file is not None:
            return False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("w")
            try:
                _lock(file)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise EngineError(f"{self._path}: cannot lock it: {error.strerror}") from error
        self._file = file
        return True

    def close(self) -> None:
        """Give it to the next."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: TextIO) -> None:
    """Wait for the turn; where a file system has no locks, two may search at once."""
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _LOG.warning("cuDNN: another engine looks for the fastest kernels; waiting for it")
        lock(file, fcntl.LOCK_EX)


def load_cache(path: Path, machine: Machine, shapes: Iterable[ConvShape]) -> dict[ConvShape, Tuned]:
    """Read what a cache knows of some shapes.

    A missing file, one of another machine and damaged entries are as good as none.
    """
    plans = _read(path, machine).plans
    found = {}
    for shape in shapes:
        with suppress(EngineError, ValueError, zlib.error):
            entry = checked(_Entry, plans.get(str(shape)), f"{path}: {shape}: ")
            found[shape] = _tuned(shape, entry)
    return found


def save_cache(path: Path, machine: Machine, tuned: Mapping[ConvShape, Tuned]) -> None:
    """Add to a cache what is known of some shapes.

    Raises
    ------
    EngineError
        When the file cannot be written.
    """
    entries = {str(shape): asdict(_entry(one)) for shape, one in tuned.items()}
    _save(path, machine, "plans", entries)


def load_winners(path: Path, machine: Machine) -> dict[str, str]:
    """Read which candidate was the fastest, by the key of `measure.Chooser`."""
    winners = _read(path, machine).winners
    return {key: name for key, name in winners.items() if isinstance(name, str)}


def save_winners(path: Path, machine: Machine, winners: Mapping[str, str]) -> None:
    """Add to a cache which candidates were the fastest.

    Raises
    ------
    EngineError
        When the file cannot be written.
    """
    _save(path, machine, "winners", winners)


def _save(path: Path, machine: Machine, part: str, entries: Mapping[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as file:
            # what others save in between would be lost; without locks it is, and measured again
            lock(file, fcntl.LOCK_EX)
            cache = _read(path, machine)
            getattr(cache, part).update(entries)
            text = json.dumps(asdict(cache), indent=1) + "\n"
            write_atomically(path, text.encode())
    except OSError as error:
        raise EngineError(f"{path}: cannot write it: {error.strerror}") from error


def tune(
    cudnn: Any,
    handle: Any,
    layers: Sequence[Mapping[int, ConvShape]],
    known: Mapping[ConvShape, Tuned],
    measure: Measure,
    *,
    device: int,
    progress: Progress | None,
    keep: Keep,
) -> dict[ConvShape, Tuned]:
    """Find the fastest plan of every shape that is not known.

    Parameters
    ----------
    layers
        Of every layer, the shape at each batch size; all of them have the same batch sizes.
    known
        Shapes that need no search.
    device
        Number of the GPU.
    progress
        Is told how many kernels of how many are compiled.
    keep
        Is given what was found at the largest batch, then the rest.

    Raises
    ------
    EngineError
        When no kernel runs a shape.
    """
    batches = sorted({batch for layer in layers for batch in layer})
    tuned = dict(known)
    for stage in (batches[-1:], batches[:-1]):
        jobs: dict[tuple[ConvShape, Choice], None] = {}
        for batch in stage:
            total = sum(layer[batch].operations for layer in layers)
            for layer in layers:
                shape = layer[batch]
                if shape in tuned:
                    continue
                near = _near(layer, shape, tuned)
                if near is None:
                    every = shape.operations >= HEAVY * total
                    tried = choices(cudnn, handle, shape, every=every)
                else:
                    tried = choices(cudnn, handle, shape, every=False)[:_ADVISED]
                    tried += near.ranking
                jobs |= dict.fromkeys((shape, choice) for choice in tried)
        if jobs:
            found = _search(list(jobs), measure, device, progress)
            keep(found)
            tuned |= found
    return tuned


def _near(
    layer: Mapping[int, ConvShape], shape: ConvShape, tuned: Mapping[ConvShape, Tuned]
) -> Tuned | None:
    """What won for a layer at the largest known batch, unless the shape has far more images."""
    known = [batch for batch, other in layer.items() if other in tuned]
    if not known or shape.batch > _NEAR * max(known):
        return None
    return tuned[layer[max(known)]]


def _search(
    jobs: Sequence[tuple[ConvShape, Choice]],
    measure: Measure,
    device: int,
    progress: Progress | None,
) -> dict[ConvShape, Tuned]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(jobs))

    tuned = {}
    for shape, plans in compile_all(jobs, device, count).items():
        times = measure(shape, plans)
        order = sorted(range(len(plans)), key=lambda index: times[index])
        order = [index for index in order if times[index] < float("inf")]
        if not order:
            raise EngineError(f"cuDNN has no kernel that runs {shape}")
        ranking = tuple(plans[index].choice for index in order[:_KEPT])
        tuned[shape] = Tuned(plans[order[0]], times[order[0]], ranking)
    return tuned


def _read(path: Path, machine: Machine) -> _Cache:
    """Read the cache of a machine; an empty one where it is missing, another's or damaged."""
    with suppress(EngineError):
        found = read_as(_Cache, path)
        if found.machine == _machine(machine):
            return found
    return _Cache(_machine(machine))


def _machine(machine: Machine) -> list[str]:
    return [machine.gpu, machine.cudnn, machine.frontend, f"search {SEARCH}"]


def _entry(tuned: Tuned) -> _Entry:
    return _Entry(
        tuned.milliseconds,
        tuple((choice.engine, dict(choice.knobs)) for choice in tuned.ranking),
        tuned.plan.workspace_bytes,
        base64.b85encode(zlib.compress(tuned.plan.plan)).decode(),
    )


def _tuned(shape: ConvShape, entry: _Entry) -> Tuned:
    ranking = tuple(Choice(engine, tuple(knobs.items())) for engine, knobs in entry.ranking)
    data = zlib.decompress(base64.b85decode(entry.plan))
    plan = CompiledPlan(shape, ranking[0], entry.workspace_bytes, data)
    return Tuned(plan, entry.milliseconds, ranking)

"""Processes that write one file at once, and one that cannot write all of it."""

from __future__ import annotations

import multiprocessing
import resource

ROUNDS = 150
SIZES = (40_000, 400_000)
"""Of what the two writers write, in bytes or thereabouts."""


def _many(write, path, size, barrier):
    barrier.wait(60)
    for _ in range(ROUNDS):
        write(path, size)


def _limited(write, path, size, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(path, size)
    except Exception as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def write_at_once(write, folder):
    """Let two processes call ``write(path, size)`` with one path, again and again.

    Parameters
    ----------
    write
        A function of a module, which writes content that only the size decides.

    Returns
    -------
    found, either
        What the file holds in the end, and what each of the writers writes.
    """
    context = multiprocessing.get_context("spawn")
    path, barrier = folder / "shared", context.Barrier(len(SIZES))
    jobs = [context.Process(target=_many, args=(write, path, s, barrier)) for s in SIZES]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(100)
    assert [job.exitcode for job in jobs] == [0, 0]
    either = []
    for size in SIZES:
        write(folder / "alone", size)
        either.append((folder / "alone").read_bytes())
    assert {file.name for file in folder.iterdir()} == {"shared", "alone"}
    return path.read_bytes(), either


def fail_to_write(write, path, capfd):
    """Call ``write(path, size)`` where files end at half of that size; what it raised, as text."""
    context = multiprocessing.get_context("spawn")
    job = context.Process(target=_limited, args=(write, path, SIZES[1], SIZES[1] // 2))
    job.start()
    job.join(100)
    assert job.exitcode == 1
    return capfd.readouterr().err.strip()

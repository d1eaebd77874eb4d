"""The processes that preprocess images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data.npy import npy_path, write_npy
from engine.protocol import InputSpec
from harness.data.transform import BadImageError, Source, preprocess_image
from harness.errors import HarnessError

_CHUNK = 8  # images per task: enough to hide the queue, few enough for Ctrl-C and load balance


@dataclass(frozen=True)
class Job:
    """What every image of a run has in common.

    Attributes
    ----------
    image_dir
        Folder of the source images.
    out_dir
        Folder of the .npy files.
    spec
        The engine's input.
    """

    image_dir: Path
    out_dir: Path
    spec: InputSpec


def run(
    job: Job, names: Sequence[str], *, workers: int, progress: bool
) -> Iterator[dict[str, Source | str]]:
    """Preprocess images in parallel.

    Yields
    ------
    dict
        As each task ends, for each of its images: the state of the source, or why it is bad.

    Raises
    ------
    HarnessError
        A process died.
    OSError
        A .npy file cannot be written.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    size = max(1, min(_CHUNK, len(names) // (4 * workers)))
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    bar = Progress(
        TextColumn("preprocess"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(chunks)),
        # fork would copy the locks of threads that an engine or LoadGen may run here
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        with bar:
            task = bar.add_task("preprocess", total=len(names))
            # Ctrl-C reaches the whole process group: the processes that start here inherit the
            # mask and end their tasks, while this one stops handing out more
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(_work, job, chunk) for chunk in chunks]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for future in as_completed(futures):
                results = future.result()
                bar.advance(task, len(results))
                yield results
    except BrokenProcessPool as error:
        raise HarnessError(
            "a preprocessing process died, perhaps for want of memory; run again with fewer "
            "workers, finished images are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import cv2

    threading.Thread(target=_die_with_parent, daemon=True).start()
    cv2.setNumThreads(1)


def _die_with_parent() -> None:
    """End this process when the parent is killed; its task queue would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job, names: Sequence[str]) -> dict[str, Source | str]:
    out = np.empty(job.spec.shape, job.spec.dtype)
    results: dict[str, Source | str] = {}
    for name in names:
        try:
            results[name] = preprocess_image(job.image_dir / name, job.spec, out)
        except BadImageError as error:
            results[name] = str(error)
        else:
            write_npy(npy_path(job.out_dir, name), out, job.spec)
    return results

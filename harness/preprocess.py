"""Preprocessed sets: every image of a map as a .npy file, once, with a manifest.

A set that is interrupted is resumed: a journal names every image that is done together with the
size and modification time of its source. An image is done again when either has changed, when
its .npy lacks bytes or holds another shape or dtype, or when the transform differs. (A hash of
every source would also notice a change that keeps both size and time stamp, for the price of
reading the whole data set at every start; ``overwrite`` is there for that.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.files import write_atomically
from engine.npy import is_npy, npy_path
from engine.preprocessed import JOURNAL, MANIFEST, PreprocessedSet, transform_settings
from engine.protocol import InputSpec
from harness.dataset import Dataset, load_map
from harness.errors import HarnessError
from harness.preprocess_pool import Job, Stamp, run

BAD_IMAGES = "bad_images.txt"

_NAMED = 5  # bad images that the error message names; BAD_IMAGES names all


def preprocess(
    dataset: Dataset,
    spec: InputSpec,
    out_dir: Path,
    *,
    workers: int,
    overwrite: bool,
    skip_bad: bool,
    progress: bool,
) -> PreprocessedSet:
    """Preprocess a data set in parallel processes, or finish what an earlier call began.

    Parameters
    ----------
    dataset
        Images and their order.
    spec
        The engine's input.
    out_dir
        Folder of the result, one per data set and input spec; made when absent.
    workers
        Number of processes.
    overwrite
        Do every image again.
    skip_bad
        Leave missing and corrupt images out of the set (the manifest names them) instead of
        stopping. Sample indices are positions in ``PreprocessedSet.files`` in any case.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    PreprocessedSet
        The complete set.

    Raises
    ------
    HarnessError
        Bad images (after all others are done; counted, and listed in ``bad_images.txt``), no
        image folder, a full disk, a worker that died.
    EngineError
        An unusable spec.
    """
    if workers < 1:
        raise HarnessError(f"{workers} workers; at least 1 is needed")
    files = load_map(dataset.map_file)
    if not dataset.image_dir.is_dir():
        raise HarnessError(
            f"image folder {dataset.image_dir} not found; download the data set {dataset.name}"
        )
    settings = _settings(spec)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for leftover in out_dir.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        (out_dir / BAD_IMAGES).unlink(missing_ok=True)
        earlier = {} if overwrite else _read_finished(out_dir, settings)
        finished = {
            name: earlier[name]
            for name in files
            if name in earlier
            and earlier[name] == _stamp(dataset.image_dir / name)
            and is_npy(npy_path(out_dir, name), spec)
        }
        bad: dict[str, str] = {}
        if len(finished) < len(files):
            # the manifest goes first: without it the folder never passes for a complete set
            _write_text(out_dir / JOURNAL, _lines([settings, *_entries(finished)]))
            (out_dir / MANIFEST).unlink(missing_ok=True)
            job = Job(dataset.image_dir, out_dir, spec)
            todo = [name for name in files if name not in finished]
            with (out_dir / JOURNAL).open("a", encoding="utf-8") as journal:
                for results in run(job, todo, workers=workers, progress=progress):
                    good = {name: r for name, r in results.items() if isinstance(r, Stamp)}
                    bad |= {name: r for name, r in results.items() if isinstance(r, str)}
                    finished |= good
                    journal.write(_lines(_entries(good)))
                    journal.flush()
        bad = {name: bad[name] for name in files if name in bad}
        if bad:
            _write_text(out_dir / BAD_IMAGES, "".join(f"{name}\t{bad[name]}\n" for name in bad))
        if bad and not (skip_bad and finished):
            raise HarnessError(_describe_bad(bad, len(files), dataset.image_dir, out_dir))
        manifest = {
            "dataset": dataset.name,
            "map_sha256": sha256(dataset.map_file.read_bytes()).hexdigest(),
            **settings,
            "images": _entries({name: finished[name] for name in files if name in finished}),
            "bad": [{"file": name, "reason": reason} for name, reason in bad.items()],
        }
        _write_text(out_dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (out_dir / JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        raise HarnessError(
            f"cannot write {error.filename or out_dir}: {error.strerror}; mend that and run "
            "again, finished images are kept"
        ) from error
    files = tuple(name for name in files if name in finished)
    return PreprocessedSet(out_dir, files, spec, manifest)


def _settings(spec: InputSpec) -> dict[str, Any]:
    """What finished images must have in common."""
    import cv2

    # for resuming alone: another OpenCV rounds differently by less than an engine would notice
    return {**transform_settings(spec), "opencv": cv2.__version__}


def _describe_bad(bad: Mapping[str, str], total: int, image_dir: Path, out_dir: Path) -> str:
    named = ", ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:_NAMED])
    rest = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return (
        f"{len(bad)} of {total} images in {image_dir} cannot be used: {named}{rest}; all are "
        f"listed in {out_dir / BAD_IMAGES}; restore them, or leave them out with --skip-bad"
    )


def _stamp(path: Path) -> Stamp | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return Stamp(state.st_size, state.st_mtime_ns)


def _entries(stamps: Mapping[str, Stamp]) -> list[dict[str, object]]:
    return [{"file": name, **stamp._asdict()} for name, stamp in stamps.items()]


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _lines(entries: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _read_finished(out_dir: Path, settings: Mapping[str, Any]) -> dict[str, Stamp]:
    """Images that the manifest, or else the journal, calls finished with the same settings."""
    try:
        if (out_dir / MANIFEST).exists():
            head = json.loads((out_dir / MANIFEST).read_bytes())
            entries = head["images"]
        else:
            head, *entries = _read_journal(out_dir / JOURNAL)
        if any(head[key] != value for key, value in settings.items()):
            return {}
        return {entry["file"]: Stamp(entry["size"], entry["mtime_ns"]) for entry in entries}
    except (ValueError, KeyError, TypeError):  # damaged: nothing is known to be finished
        return {}


def _read_journal(path: Path) -> Iterator[Any]:
    """Lines of a journal up to one that a crash cut short."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

"""Preprocessed sets: every image of a map as a .npy file, once, with a manifest.

A set is made in a folder ``NAME.partial``; complete, it is named by `harness.data.sets`. Meanwhile
``NAME.lock`` is held.

A set that is interrupted is resumed: a journal names every image that is done together with the
size, modification time and SHA-256 of its source. An image is done again when its source has
changed, when its .npy lacks bytes or holds another shape or dtype, or when the transform differs;
else the new set shares the file with the old one (a hard link).
A source of the same size and time has not changed; with the same size and another time, as a copy
has, its hash decides. (A change that keeps both size and time is not noticed; ``overwrite`` is
there for that.)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.data.npy import is_npy, npy_bytes, npy_path
from engine.data.preprocessed import (
    JOURNAL,
    MANIFEST,
    BadImage,
    ImageEntry,
    PreprocessedSet,
    SetManifest,
    load_preprocessed,
    preprocess_command,
    transform_settings,
    unfinished,
)
from engine.errors import EngineError
from engine.protocol import InputSpec
from engine.support.documents import parse_json
from engine.support.files import file_sha256, write_atomically
from harness.artefacts import TRANSFORM_CODE, Say, code_sha256
from harness.data.dataset import Dataset, assumed, check_images, load_map, where_else
from harness.data.pool import Job, run
from harness.data.sets import name_to_write, publish, remove_others, take_over
from harness.data.transform import Source
from harness.disk import require_space
from harness.errors import HarnessError
from harness.lock import locked

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
    say: Say,
) -> PreprocessedSet:
    """Preprocess a data set in parallel processes, or finish what an earlier call began.

    Parameters
    ----------
    dataset
        Images and their order.
    spec
        The engine's input.
    out_dir
        Name of the result, one per data set and input spec: a link to the newest set of that name.
        A set that has the name itself, as they had before, becomes one that is linked.
    workers
        Number of processes.
    overwrite
        Do every image again.
    skip_bad
        Leave missing and corrupt images out of the set (the manifest names them) instead of
        stopping. Sample indices are positions in ``PreprocessedSet.files`` in any case.
    progress
        Show a progress bar on stderr.
    say
        Takes one line for each earlier set that is removed, or cannot be.

    Returns
    -------
    PreprocessedSet
        The complete set.

    Raises
    ------
    HarnessError
        Bad images (after all others are done; counted, and listed in ``bad_images.txt``), not one
        of the images there, a folder of something else or a finished set under the name, a disk
        without room for all (nothing is written then) or full, a worker that died.
    EngineError
        An unusable spec.
    """
    if workers < 1:
        raise HarnessError(f"{workers} workers; at least 1 is needed")
    check_images(dataset)
    settings = _settings(spec)
    out_dir = name_to_write(out_dir)
    partial = unfinished(out_dir)
    try:
        # two that write into one set would mix their images
        with locked(out_dir, file=out_dir.with_name(f"{out_dir.name}.lock")):
            take_over(out_dir, partial)
            partial.mkdir(exist_ok=True)
            current = out_dir.resolve() if out_dir.is_symlink() else None
            manifest = _fill(
                dataset,
                spec,
                partial,
                current,
                settings,
                workers=workers,
                overwrite=overwrite,
                skip_bad=skip_bad,
                progress=progress,
            )
            if manifest is None:
                shutil.rmtree(partial)
            else:
                publish(partial, out_dir, manifest)
            remove_others(out_dir, say)
    except OSError as error:
        raise HarnessError(
            f"cannot write {error.filename or out_dir}: {error.strerror}; mend that and run "
            "again, finished images are kept"
        ) from error
    return load_preprocessed(out_dir, spec)


def _fill(
    dataset: Dataset,
    spec: InputSpec,
    partial: Path,
    current: Path | None,
    settings: Mapping[str, Any],
    *,
    workers: int,
    overwrite: bool,
    skip_bad: bool,
    progress: bool,
) -> SetManifest | None:
    """Make the set in `partial`, with what `current` has of it; None: it is the current one."""
    files = load_map(dataset.map_file)
    found: dict[str, tuple[Source, Path]] = {}
    for folder in (partial,) if current is None else (current, partial):
        earlier = {} if overwrite else _read_finished(folder, settings)
        found |= {
            name: (source, folder)
            for name in files
            if name in earlier
            and is_npy(npy_path(folder, name), spec)
            and (source := _unchanged(dataset.image_dir / name, earlier[name]))
        }
    shared = {name for name, (_, folder) in found.items() if folder == current}
    keep = {JOURNAL, MANIFEST, *(f"{name}.npy" for name in found.keys() - shared)}
    for path in partial.rglob("*"):
        if not path.is_dir() and str(path.relative_to(partial)) not in keep:
            path.unlink()
    present = [name for name in files if name not in found and (dataset.image_dir / name).exists()]
    require_space(partial, len(present) * npy_bytes(spec))
    for name in shared:
        try:
            npy_path(partial, name).parent.mkdir(parents=True, exist_ok=True)
            os.link(npy_path(found[name][1], name), npy_path(partial, name))
        except OSError:  # not every file system has hard links
            del found[name]
    finished = {name: source for name, (source, _) in found.items()}
    _write_text(partial / JOURNAL, _lines([settings, *_entries(finished)]))
    (partial / MANIFEST).unlink(missing_ok=True)
    bad: dict[str, str] = {}
    if todo := [name for name in files if name not in finished]:
        job = Job(dataset.image_dir, partial, spec)
        with (partial / JOURNAL).open("a", encoding="utf-8") as journal:
            for results in run(job, todo, workers=workers, progress=progress):
                good = {name: r for name, r in results.items() if isinstance(r, Source)}
                bad |= {name: r for name, r in results.items() if isinstance(r, str)}
                finished |= good
                journal.write(_lines(_entries(good)))
                journal.flush()
    bad = {name: bad[name] for name in files if name in bad}
    if bad:
        _write_text(partial / BAD_IMAGES, "".join(f"{name}\t{bad[name]}\n" for name in bad))
    if bad and not (skip_bad and finished):
        raise HarnessError(_describe_bad(bad, len(files), dataset.image_dir, partial))
    done = {name: finished[name] for name in files if name in finished}
    manifest = SetManifest(
        dataset=dataset.name,
        map_sha256=file_sha256(dataset.map_file),
        **settings,
        images=[ImageEntry(name, *source) for name, source in done.items()],
        bad=[BadImage(name, reason) for name, reason in bad.items()],
    )
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    if current is not None and shared.issuperset(done) and text == _text(current / MANIFEST):
        return None
    _write_text(partial / MANIFEST, text)
    (partial / JOURNAL).unlink()
    return manifest


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def open_current(dataset: Dataset, spec: InputSpec, directory: Path) -> PreprocessedSet:
    """Open a preprocessed set, unless the data set has changed since.

    Images whose sources are not there any more count as unchanged.

    Parameters
    ----------
    dataset
        Where the images came from.
    spec
        The engine's input.
    directory
        Folder of the set.

    Raises
    ------
    EngineError
        No complete set for this input, see `load_preprocessed`.
    HarnessError
        The map lists other images, or in another order; images have changed.
    """
    try:
        found = load_preprocessed(directory, spec, dataset.name)
    except EngineError as error:
        if not directory.exists() and (hint := assumed(dataset.name.rpartition("-")[0])):
            raise HarnessError(f"{error}; {hint}") from error
        raise
    again = f"run {preprocess_command(dataset.name)} again"
    bad = {entry["file"] for entry in found.manifest["bad"]}
    try:
        sources = [(entry["file"], _source(entry)) for entry in found.manifest["images"]]
    except KeyError as error:
        raise HarnessError(f"{directory / MANIFEST} is damaged; {again}") from error
    if found.files != tuple(name for name in load_map(dataset.map_file) if name not in bad):
        raise HarnessError(
            f"{directory} was preprocessed by another map than {dataset.map_file} is now; {again}"
        )
    changed = [
        name
        for name, source in sources
        if (path := dataset.image_dir / name).exists() and not _unchanged(path, source)
    ]
    if changed:
        raise HarnessError(
            f"{len(changed)} of {len(sources)} images in {dataset.image_dir} have changed since "
            f"{directory} was made, the first is {changed[0]}; {again}"
        )
    return found


def _settings(spec: InputSpec) -> dict[str, Any]:
    """What finished images must have in common."""
    import cv2

    # for resuming alone: other code, and an OpenCV that rounds differently, make an image again
    return {
        **transform_settings(spec),
        "opencv": cv2.__version__,
        "code_sha256": code_sha256(TRANSFORM_CODE),
    }


def _describe_bad(bad: Mapping[str, str], total: int, image_dir: Path, out_dir: Path) -> str:
    named = ", ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:_NAMED])
    rest = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    found = where_else(image_dir, [name for name in bad if not (image_dir / name).exists()])
    hint = f"{found}; " if found else ""
    return (
        f"{len(bad)} of {total} images in {image_dir} cannot be used: {named}{rest}; all are "
        f"listed in {out_dir / BAD_IMAGES}; {hint}restore them, or leave "
        "them out with --skip-bad"
    )


def _unchanged(path: Path, before: Source) -> Source | None:
    """State of a source that is what it was, None for any other."""
    try:
        state = path.stat()
        if state.st_size != before.size:
            return None
        if state.st_mtime_ns != before.mtime_ns and file_sha256(path) != before.sha256:
            return None
    except OSError:
        return None
    return before._replace(mtime_ns=state.st_mtime_ns)


def _entries(sources: Mapping[str, Source]) -> list[dict[str, object]]:
    return [{"file": name, **source._asdict()} for name, source in sources.items()]


def _source(entry: Mapping[str, Any]) -> Source:
    shape = entry.get("shape")  # the first sets did not say
    return Source(
        entry["size"],
        entry["mtime_ns"],
        entry["sha256"],
        None if shape is None else (shape[0], shape[1]),
    )


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _lines(entries: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _read_finished(out_dir: Path, settings: Mapping[str, Any]) -> dict[str, Source]:
    """Images that the manifest, or else the journal, calls finished with the same settings."""
    try:
        if (out_dir / MANIFEST).exists():
            head = parse_json((out_dir / MANIFEST).read_bytes())
            entries = head["images"]
        else:
            head, *entries = _read_journal(out_dir / JOURNAL)
        if any(head[key] != value for key, value in settings.items()):
            return {}
        return {entry["file"]: _source(entry) for entry in entries}
    except (ValueError, KeyError, TypeError):  # damaged: nothing is known to be finished
        return {}


def _read_journal(path: Path) -> Iterator[Any]:
    """Lines of a journal up to one that a crash cut short."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield parse_json(line)
            except ValueError:
                return

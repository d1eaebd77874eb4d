"""Names of a detector's classes: a checkpoint's own, a file's, or COCO's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from export.errors import ExportError
from graph_surgery.names import COCO, read_names


def choose_names(
    file: Path | None, own: Sequence[str], num_classes: int, *, background: bool
) -> tuple[tuple[str, ...], str]:
    """Choose the names of a detector's labels, and say whose they are.

    Parameters
    ----------
    file
        Of the user, which counts before all others.
    own
        The checkpoint's; none: COCO's, if the number of classes is COCO's.
    num_classes, background
        Classes, and whether the first is the background, which has no name.

    Returns
    -------
    names
        One of each class but the background, or none when nobody has any.
    source
        For people.

    Raises
    ------
    SurgeryError
        When the file is unusable.
    ExportError
        When there are more or fewer names than classes.
    """
    labels = num_classes - background
    if file is not None:
        names, source = read_names(file), str(file)
    elif own and not all(name and name.isprintable() for name in own):
        return (), "the checkpoint's own are empty or have control characters; give --names FILE"
    elif own:
        names, source = list(own), "the checkpoint's own"
    elif labels == len(COCO):
        names, source = list(COCO), f"COCO's, for {num_classes} classes; others: --names FILE"
    else:
        return (), "none known; give them with --names FILE"
    if background and len(names) == num_classes and names[0].strip("_").lower() == "background":
        del names[0]
    if len(names) != labels:
        raise ExportError(
            f"{len(names)} class names ({source}), the model has {num_classes} classes"
            f"{', with background' * background}: give {labels} names, one a line, as --names FILE"
        )
    return tuple(names), source


def names_from_json(text: str) -> tuple[str, ...]:
    """Names under `NAMES_KEY`; none when it is no list of texts."""
    try:
        return text_list(json.loads(text))
    except (ValueError, RecursionError):
        return ()


def text_list(value: object) -> tuple[str, ...]:
    """Texts of a list, or of a dict of the numbers 0, 1…; none for anything else."""
    if isinstance(value, dict) and sorted(value, key=str) == sorted(range(len(value)), key=str):
        value = [value[number] for number in range(len(value))]
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(value)
    return ()

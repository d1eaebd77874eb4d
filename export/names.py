"""Names of a detector's classes: a checkpoint's own, a file's, or COCO's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from export.errors import ExportError
from graph_surgery.names import COCO, read_names


def choose_names(
    file: Path | None, own: Sequence[str], num_classes: int
) -> tuple[tuple[str, ...], str]:
    """Choose the names of the labels 1, 2…, and say whose they are.

    Parameters
    ----------
    file
        Of the user, which counts before all others.
    own
        The checkpoint's; none: COCO's, if the number of classes is COCO's.
    num_classes
        Classes with background.

    Returns
    -------
    names
        ``num_classes - 1`` of them, or none when nobody has any.
    source
        For people.

    Raises
    ------
    SurgeryError
        When the file is unusable.
    ExportError
        When there are more or fewer names than classes.
    """
    if file is not None:
        names, source = read_names(file), str(file)
    elif own and not all(name and name.isprintable() for name in own):
        return (), "the checkpoint's own are empty or have control characters; give --names FILE"
    elif own:
        names, source = list(own), "the checkpoint's own"
    elif num_classes == len(COCO) + 1:
        names, source = list(COCO), f"COCO's, for {num_classes} classes; others: --names FILE"
    else:
        return (), "none known; give them with --names FILE"
    if len(names) == num_classes and names[0].strip("_").lower() == "background":
        del names[0]
    if len(names) != num_classes - 1:
        raise ExportError(
            f"{len(names)} class names ({source}), the model has {num_classes} classes, with "
            f"background: give {num_classes - 1} names, one a line, as --names FILE"
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

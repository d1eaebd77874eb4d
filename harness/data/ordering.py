"""Categories of annotations in the order of a model's classes, matched by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from harness.data.oddities import model_classes, plain_name
from harness.errors import HarnessError

_NAMED = 10


def in_order_of(
    model: Path, content: Mapping[str, Any], annotations: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """List all classes of a model as the categories of annotations, in the model's order.

    A category is the class of the very same name, else of the one name that differs in case,
    spaces and punctuation alone, as `class_oddities` compares them.

    Parameters
    ----------
    model
        ONNX file or engine, whose metadata has class names.
    content
        As `engine.data.coco.load_annotations` gives it; not changed.
    annotations
        Its file, for messages.

    Returns
    -------
    content
        With other ``categories``: those that there were as they were, with their ids; classes that
        had none, with the lowest ids from 1 that are free.
    oddities
        What says which names are not the very same: 'c++' is taken for the class 'c'.

    Raises
    ------
    HarnessError
        A model without names; a name that stands twice; categories that the model does not have.
    EngineError
        Damaged model or manifest.
    """
    number, names = model_classes(model)
    if not names:
        raise HarnessError(
            f"{model} has no class names, by which categories are matched; export-onnx and "
            "graph-surgery nms write them with --names FILE"
        )
    if number is not None and number != len(names):
        raise HarnessError(f"{model} detects {number} classes and names {len(names)}")
    categories: Sequence[Mapping[str, Any]] = content["categories"]
    own = [str(entry["name"]) for entry in categories]
    for file, listed, what in ((model, names, "classes"), (annotations, own, "categories")):
        if twice := [name for name, times in Counter(listed).items() if times > 1]:
            raise HarnessError(f"{file}: {what} of the same name: {_shown(twice)}")
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(plain_name(name), []).append(name)
    exact, entries, missing = set(names), dict[str, Mapping[str, Any]](), []
    for name, entry in zip(own, categories, strict=True):
        near = [name] if name in exact else alike.get(plain_name(name) or name, [])
        if len(near) != 1:
            missing.append(name)
        elif near[0] in entries:
            both = (str(entries[near[0]]["name"]), name)
            raise HarnessError(
                f"{annotations}: categories of the same class of the model: {_shown(both)}"
            )
        else:
            entries[near[0]] = entry
    if missing:
        raise HarnessError(
            f"{annotations}: {model} has no class of the name of {len(missing)} categories: "
            f"{_shown(missing)}; rename them as the model does (graph-surgery inspect shows the "
            "names in its .onnx), or take them out"
        )
    taken = {entry["id"] for entry in categories}
    free = (one for one in count(1) if one not in taken)
    new = [entries.get(name) or {"id": next(free), "name": name} for name in names]
    pairs = [(str(one["name"]), name) for name, one in entries.items() if one["name"] != name]
    said = (
        f"{len(pairs)} categories are not named as the model's classes that they are taken for, as "
        f"{a!a} for {b!a}"
        for a, b in pairs[:1]
    )
    return {**content, "categories": new}, tuple(said)


def _shown(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return f"{', '.join(listed[:_NAMED])}{more}"

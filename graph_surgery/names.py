"""Names of a detector's classes: the model's own, a file's, or COCO's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx

from graph_surgery.errors import SurgeryError
from graph_surgery.nms_function import OP_TYPE

NAMES_KEY = "class_names"
"""ONNX metadata key: a JSON list of the names of the labels, from the first label on."""

DETECTOR_KEY = "detector"
"""ONNX metadata key: which network it is, for those who treat several."""

FIRST_LABEL_KEY = "first_label"
"""ONNX metadata key: ``0`` where no class is the background and labels count from 0."""

SIZE_GUESS_KEY = "image_size_guess"
"""ONNX metadata key: the image's size, HEIGHTxWIDTH, where nothing told it and it was guessed."""

_COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, "
    "elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, "
    "skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, "
    "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
    "potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell "
    "phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)
COCO = tuple(_COCO.split(", "))
"""COCO's 80 categories, in the order of its annotation files: label L is the L-th."""


def first_label(metadata: Mapping[str, str], background: int | None) -> int:
    """Label of a detector's first class: 1 where class 0 is the background, else 0.

    Parameters
    ----------
    metadata
        Of its file.
    background
        backgroundLabelId of its NMS_OPT_TRT, which counts first; None: it has none.
    """
    if background is not None:
        return int(background == 0)
    return 0 if metadata.get(FIRST_LABEL_KEY) == "0" else 1


def add_names(model: onnx.ModelProto, file: Path | None) -> str:
    """Write the class names into the metadata of a surgered model, unless it has them.

    Parameters
    ----------
    model
        Changed in place.
    file
        Names of the user, one a line, which replace any others. None: COCO's, for a model of as
        many classes without names.

    Returns
    -------
    str
        What the model has now, a sentence.

    Raises
    ------
    SurgeryError
        When the file is unusable, there are more or fewer names than detected classes, or one has
        control characters.
    """
    (node,) = (node for node in model.graph.node if node.op_type == OP_TYPE)
    values = {a.name: a.i for a in node.attribute}
    classes, background = values["numClasses"], values["backgroundLabelId"]
    labels = classes - (background in (0, classes - 1))
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if file is not None:
        names, source = read_names(file), str(file)
    elif NAMES_KEY in entries:
        names, source = names_from_json(entries[NAMES_KEY]), "the model's own"
    elif labels == len(COCO):
        names, source = list(COCO), f"COCO's, for {labels} classes; others: --names FILE"
    else:
        return "class names: none known; give them with --names FILE"
    if len(names) == labels + 1 and names[0].strip("_").lower() == "background":
        del names[0]
    if len(names) != labels:
        raise SurgeryError(
            f"{len(names)} class names ({source}), the model detects {labels} classes: "
            f"give {labels} names, one a line, as --names FILE"
        )
    if not all(name and name.isprintable() for name in names):
        raise SurgeryError(f"class names ({source}): one is empty or has control characters")
    onnx.helper.set_model_props(model, entries | {NAMES_KEY: json.dumps(names)})
    return f"class names: {len(names)}, {source}"


def read_names(path: Path) -> list[str]:
    """Read a file of class names, one a line; empty lines do not count.

    Raises
    ------
    SurgeryError
        When it cannot be read or is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SurgeryError(f"{path}: cannot read the names: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SurgeryError(f"{path}: no UTF-8 text with a class name a line") from error
    return [line.strip() for line in lines if line.strip()]


def names_from_json(text: str) -> list[str]:
    """Read what stands under `NAMES_KEY`.

    Raises
    ------
    SurgeryError
        When it is no JSON list of texts.
    """
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SurgeryError(f"the metadata {NAMES_KEY} is no JSON list of names: give --names FILE")
    return names

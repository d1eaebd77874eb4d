"""What makes a mAP wrong without an error: annotations that fit neither images nor model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.data.coco import load_annotations
from engine.data.preprocessed import PreprocessedSet
from engine.inspect import read_model
from harness.benchmarks import benchmark_of_file
from harness.data.dataset import Dataset, again_with_model
from harness.errors import HarnessError

_SLACK = 1.0  # pixels that boxes reach beyond their image where tools round


def oddities(
    dataset: Dataset, images: PreprocessedSet, model: Path | None = None
) -> tuple[str, ...]:
    """Compare a data set's annotations with its images as they were decoded, and with a model.

    Parameters
    ----------
    dataset
        Without annotations there is nothing odd.
    images
        Preprocessed images of it.
    model
        ONNX file or engine; None: not known.

    Returns
    -------
    tuple of str
        A sentence for each thing that a reader of the mAP must know.

    Raises
    ------
    EngineError
        Damaged annotations, model or manifest.
    """
    if dataset.annotations is None or not dataset.annotations.exists():
        return ()
    content = load_annotations(dataset.annotations)
    shapes = {
        entry["file"]: tuple(entry["shape"])
        for entry in images.manifest["images"]
        if entry.get("shape")
    }
    found = [*annotation_oddities(content), *size_oddities(content, shapes)]
    if model is not None:
        from engine.model import size_guess

        # at the size of the model's own benchmark a guess is no wonder
        own = benchmark_of_file(model).dataset == dataset.name.rpartition("-")[0]
        if not own and (guess := size_guess(read_model(model).metadata)):
            found.append(
                f"the model's image size, {guess}, is a guess, which its weights do not tell; if "
                "it was trained at another, export it with --image-size (make: IMAGE_SIZE)"
            )
        count, names = model_classes(model)
        found += class_oddities([entry["name"] for entry in content["categories"]], count, names)
    return tuple(found)


def check_classes(dataset: Dataset, model: Path) -> None:
    """Refuse a model with more classes than a data set has categories: some labels have none.

    Raises
    ------
    HarnessError
        Says both numbers, and what to do.
    EngineError
        Damaged annotations, model or manifest.
    """
    if dataset.annotations is None or not dataset.annotations.exists():
        return
    categories = load_annotations(dataset.annotations)["categories"]
    count, names = model_classes(model)
    if count is not None and count > len(categories):
        how = "list all categories of the model there, in its order, also those without an object"
        if names:
            how = f"`{again_with_model(dataset, model)}` lists all of them, by their names"
        raise HarnessError(
            f"the model detects {count} classes, {dataset.annotations} has {len(categories)} "
            f"categories: they go together by their order, and some classes have none; {how}"
        )


def annotation_oddities(content: Mapping[str, Any]) -> list[str]:
    """Say which annotations cannot be matched, or are not what the COCO format says.

    `content` is as `engine.data.coco.load_annotations` gives it.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    boxes = [
        (entry["id"], *entry["bbox"], *sizes[entry["image_id"]], entry["area"])
        for entry in content["annotations"]
    ]
    empty = [box for box in boxes if min(box[3:5]) <= 0]
    whole = [box for box in boxes if min(box[3:5]) > 0]
    outside = [
        box
        for box in whole
        if box[1] >= box[5] or box[2] >= box[6] or box[1] + box[3] <= 0 or box[2] + box[4] <= 0
    ]
    beyond = [
        box
        for box in whole
        if min(box[1], box[2]) < -_SLACK
        or box[1] + box[3] > box[5] + _SLACK
        or box[2] + box[4] > box[6] + _SLACK
    ]
    tiny = [box for box in whole if max(box[1:5]) <= 1]
    wide = [box for box in whole if box[7] > 1.01 * box[3] * box[4] + _SLACK]
    flat = [box for box in whole if box[7] <= 0]
    zero = [box for box in boxes if box[0] == 0]
    cases: list[tuple[list[Any], str]] = [
        (empty, "have a box without width or height, which nothing can match"),
        (outside, "have a box outside their image, which nothing can match"),
        (beyond, "have a box that reaches beyond its image; boxes are [x, y, width, height]"),
        (tiny, "have a box within the first pixel; boxes are in pixels, not fractions"),
        (wide, "have an area larger than their box; it decides whether an object is small"),
        (flat, "have no area; it decides whether an object is small"),
    ]
    found = [
        f"{len(which)} of {len(boxes)} annotations {what}; the first has the id {which[0][0]}"
        for which, what in cases
        if which
    ]
    if zero:
        found.append("annotation id 0 never counts as matched; number annotations from 1")
    if not boxes:
        found.append("the annotations hold no object, so that mAP is undefined (-1)")
    return found


def size_oddities(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say which images were decoded to another (height, width) than is annotated."""
    different = [
        (image, shapes[image["file_name"]])
        for image in content["images"]
        if image["file_name"] in shapes
        and shapes[image["file_name"]] != (image["height"], image["width"])
    ]
    turned = [pair for pair in different if pair[1] == (pair[0]["width"], pair[0]["height"])]
    cases: list[tuple[list[Any], str]] = [
        (turned, "as before the rotation that their EXIF data asks for"),
        ([pair for pair in different if pair not in turned], "to which their boxes belong"),
    ]
    return [
        f"{len(which)} of {len(shapes)} images are annotated with another size than they have, "
        f"{what}, so that mAP is wrong; the first is {which[0][0]['file_name']}: annotated "
        f"{which[0][0]['width']}x{which[0][0]['height']}, decoded {which[0][1][1]}x{which[0][1][0]}"
        for which, what in cases
        if which
    ]


def class_oddities(categories: Sequence[str], count: int | None, names: Sequence[str]) -> list[str]:
    """Compare a model's classes with the annotations' categories: they go together by their order.

    Parameters
    ----------
    categories
        Names, in the order of the annotation file.
    count
        Classes of the model, without background; None: not known.
    names
        Their names; empty: not known.
    """
    if count is not None and count != len(categories):
        return [
            f"the model detects {count} classes, the annotations have {len(categories)} "
            "categories; they go together by their order, also where the first is unused"
        ]
    pairs = [(str(a), str(b)) for a, b in zip(names, categories, strict=False)]
    number = next((n for n, (a, b) in enumerate(pairs, 1) if plain_name(a) != plain_name(b)), None)
    if number is None:
        return []
    differ = sum(plain_name(a) != plain_name(b) for a, b in pairs)
    ours, theirs = ({plain_name(str(one)) for one in listed} for listed in (names, categories))
    how = "; `harness dataset add` orders them by name, with --model" if theirs <= ours else ""
    return [
        f"{differ} of {len(pairs)} classes are named otherwise in the annotations, the first is "
        f"number {number}: {pairs[number - 1][0]!a} in the model, {pairs[number - 1][1]!a} there; "
        f"they go together by their order{how}"
    ]


def plain_name(name: str) -> str:
    """Name without case, spaces and punctuation, in which those of one class may differ."""
    return "".join(filter(str.isalnum, name.casefold()))


def model_classes(model: Path) -> tuple[int | None, tuple[str, ...]]:
    """Classes of an ONNX file or an engine without background, and their names.

    None and nothing where it does not tell.

    Raises
    ------
    EngineError
        Damaged model or manifest.
    """
    from engine.model import Detector, class_names

    known = read_model(model)
    names = class_names(known.metadata)
    return (known.classes if isinstance(known, Detector) else len(names) or None), names

"""What an accuracy run got right and wrong: by class, and image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.results.accuracy import Evaluation
from harness.results.pictures import SCORE_THRESHOLD

WORST = 12
"""Images of a run on a page."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the image."""


@dataclass(frozen=True)
class ClassReview:
    """One category that has annotations.

    Attributes
    ----------
    name
        Of the category.
    truths
        Its annotated objects that count, on the images seen.
    ap, ap50
        Average precision over IoU 0.50..0.95, and at 0.50; fractions.
    precision
        At IoU 0.50, for each of COCO's 101 recalls 0.00, 0.01..1.00; 0 where no recall is reached.
    """

    name: str
    truths: int
    ap: float
    ap50: float
    precision: tuple[float, ...]


@dataclass
class ImageReview:
    """One image, at IoU 0.50 and scores from `SCORE_THRESHOLD` on.

    Attributes
    ----------
    file
        Its name.
    missed, false, right
        Name and box of each annotated object that was not found, each detection that is none, and
        each that is one; the latter two with their score in the name.
    """

    file: str
    missed: list[tuple[str, Box]] = field(default_factory=list)
    false: list[tuple[str, Box]] = field(default_factory=list)
    right: list[tuple[str, Box]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """What is missed, and what is false."""
        return len(self.missed) + len(self.false)


@dataclass(frozen=True)
class Review:
    """What a page shows of an evaluation.

    Attributes
    ----------
    ap
        The mAP.
    classes
        Of each category that has annotations.
    worst
        Images with the most errors, `WORST` at most.
    """

    ap: float
    classes: Sequence[ClassReview]
    worst: Sequence[ImageReview]


def review(found: Evaluation) -> Review:
    """Review an evaluation, which for COCO takes gigabytes, so that it need not be kept."""
    by_errors = sorted(review_images(found), key=lambda image: -image.errors)
    return Review(float(found.coco.stats[0]), review_classes(found), by_errors[:WORST])


def review_classes(found: Evaluation) -> tuple[ClassReview, ...]:
    """Review each category that has annotations on the images seen, in order of their ids."""
    names = {entry["id"]: str(entry["name"]) for entry in found.content["categories"]}
    precision = found.coco.eval["precision"][:, :, :, 0, -1]  # IoU, recall, category
    truths = _truths(found)
    return tuple(
        ClassReview(
            names[category],
            truths[category],
            float(precision[:, :, position].mean()),
            float(precision[0, :, position].mean()),
            tuple(precision[0, :, position].round(4).tolist()),
        )
        for position, category in enumerate(found.coco.params.catIds)
        if truths[category]
    )


def review_images(found: Evaluation) -> Sequence[ImageReview]:
    """Review every image, in the log's order.

    Detections of categories without annotations are not false: no AP counts them.
    """
    truths = _truths(found)
    names = {entry["id"]: str(entry["name"]) for entry in found.content["categories"]}
    reviews = {image["id"]: ImageReview(image["file_name"]) for image in found.images}
    sizes = {image["id"]: np.array([image["width"], image["height"]] * 2) for image in found.images}
    for entry in _by_image(found):
        review, size = reviews[entry["image_id"]], sizes[entry["image_id"]]
        name = names[entry["category_id"]]
        scores = dict(zip(entry["dtIds"], entry["dtScores"], strict=True))
        for number, match, ignored in zip(
            entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"], strict=True
        ):
            # COCOeval goes by score: without the low ones the others match as they do
            if not ignored and scores.get(int(match), 0.0) < SCORE_THRESHOLD:
                review.missed.append((name, _box(found.coco.cocoGt.anns[number], size)))
        for number, match, ignored in zip(
            entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True
        ):
            judged = not ignored and truths[entry["category_id"]]
            if judged and scores[number] >= SCORE_THRESHOLD:
                kind = review.right if match else review.false
                text = f"{name} {scores[number]:.2f}"
                kind.append((text, _box(found.coco.cocoDt.anns[number], size)))
    return tuple(reviews.values())


def _truths(found: Evaluation) -> dict[int, int]:
    """Objects of each category on the images seen that a detection can match."""
    truths = {int(entry["id"]): 0 for entry in found.content["categories"]}
    for entry in _by_image(found):
        truths[entry["category_id"]] += int((~entry["gtIgnore"].astype(bool)).sum())
    return truths


def _by_image(found: Evaluation) -> list[dict[str, Any]]:
    """COCOeval's matches of each category on each image, objects of all sizes."""
    areas, images = len(found.coco.params.areaRng), len(found.coco.params.imgIds)
    entries = found.coco.evalImgs
    return [
        entry
        for start in range(0, len(entries), areas * images)
        for entry in entries[start : start + images]
        if entry is not None
    ]


def _box(entry: dict[str, list[float]], size: NDArray[np.int64]) -> Box:
    x, y, width, height = entry["bbox"]
    left, top, right, bottom = (np.array([x, y, x + width, y + height]) / size).tolist()
    return left, top, right, bottom

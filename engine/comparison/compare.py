"""Compare two detectors on the same images: head tensors and detections, by Polygraphy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import (
    Comparator,
    IterationResult,
    SimpleCompareFunc,
    SnrCompareFunc,
)
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from engine.comparison.runners import IMAGES, ROWS
from engine.comparison.tensors import is_head
from engine.comparison.tolerance import Check, Tolerance
from engine.data.coco import coco_stats, load_annotations, positions_by_name
from engine.data.matching import Matches, match_detections
from engine.errors import EngineError, one_line


@dataclass(frozen=True)
class HeadDifference:
    """One head tensor, over all images.

    Attributes
    ----------
    name
        Its role: ``loc_0``…, ``conf_0``….
    snr_median, snr_least
        Power of the first side's tensor over the power of the difference, in dB, over the images;
        infinite where they are equal.
    worst_image
        Position of the image with the least.
    absolute_largest, absolute_mean
        Absolute difference.
    relative_median
        Mean over the images of the median of the absolute difference over the second side's value.
    """

    name: str
    snr_median: float
    snr_least: float
    worst_image: int
    absolute_largest: float
    absolute_mean: float
    relative_median: float


@dataclass(frozen=True)
class DetectionDifference:
    """Detections of all images, paired by `engine.data.matching`.

    Attributes
    ----------
    first, second
        Number of detections.
    matched, missed, extra
        Pairs; detections of the first side alone; of the second side alone.
    iou_mean
        Of the pairs; NaN without any.
    score_largest
        Largest absolute difference in score of a pair; 0 without any.
    """

    first: int
    second: int
    matched: int
    missed: int
    extra: int
    iou_mean: float
    score_largest: float

    @property
    def share(self) -> float:
        """Share of all detections that have a partner; 1 when there are none."""
        return 2 * self.matched / (self.first + self.second) if self.first + self.second else 1.0


@dataclass(frozen=True)
class Comparison:
    """Outcome of `compare`.

    Attributes
    ----------
    images
        Number of images.
    heads
        Head tensors that both sides have; empty when one has none.
    detections
        The detections.
    layers
        The other tensors that were compared, in the order of the graph.
    alone
        Head tensors of the second side against ONNX Runtime on its own graph; empty where that was
        not asked.
    precision
        mAP of the first and of the second side; NaN where the images have no ground truth, None
        without annotations.
    checks
        Figures against the tolerance.
    """

    images: int
    heads: tuple[HeadDifference, ...]
    detections: DetectionDifference
    precision: tuple[float, float] | None
    checks: tuple[Check, ...]
    layers: tuple[HeadDifference, ...] = ()
    alone: tuple[HeadDifference, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, object]:
        """Every figure, and the verdicts."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {**asdict(self), "checks": checks, "passed": self.passed}


@dataclass(frozen=True)
class Truth:
    """Ground truth of the images of a comparison.

    Attributes
    ----------
    content
        Annotation file.
    images
        Its entry of every image, in the order of the comparison.
    first_label
        Label that detections of its first category have.
    """

    content: Mapping[str, Any]
    images: Sequence[Mapping[str, Any]]
    first_label: int = 1


def load_truth(annotations: Path, files: Sequence[str], first_label: int = 1) -> Truth:
    """Look images up in a COCO annotation file.

    Parameters
    ----------
    annotations
        COCO instances JSON.
    files
        File names of the images.
    first_label
        See `Truth`.

    Raises
    ------
    EngineError
        When the file is unusable or lacks an image.
    """
    content = load_annotations(annotations)
    positions = positions_by_name(content["images"], annotations)
    missing = [name for name in files if name not in positions]
    if missing:
        raise EngineError(
            f"{annotations} lacks {len(missing)} of {len(files)} images, the first is {missing[0]}"
        )
    images = [content["images"][positions[name]] for name in files]
    return Truth(content, images, first_label)


def compare(
    first: BaseRunner,
    second: BaseRunner,
    images: Iterable[NDArray[np.float32]],
    tolerance: Tolerance,
    *,
    truth: Truth | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Run two detectors on the same images in one Polygraphy comparison.

    Images stream: neither they nor the head tensors are kept.

    Parameters
    ----------
    first
        Runner with the contract of `engine.comparison.runners`; the reference.
    second
        Another one.
    images
        float32 [3, H, W] each, normalised.
    tolerance
        What is allowed.
    truth
        To evaluate the detections.
    progress
        Told the number of images done.

    Raises
    ------
    EngineError
        When a side fails, their head tensors are not the same or differ in shape, or there is
        nothing to compare.
    """
    heads, detections = _Heads(), _Detections()

    def feeds() -> Iterator[dict[str, NDArray[np.float32]]]:
        for done, image in enumerate(images):
            if progress is not None:
                progress(done)
            yield {IMAGES: image[None]}

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # what it would print is in the results
        try:
            stream = Comparator.run([first, second], data_loader=feeds(), streaming=True)
            Comparator.compare_accuracy(stream, compare_func=[heads, detections])
        except PolygraphyException as error:
            raise EngineError(f"Polygraphy: {one_line(error)}") from error
    if not detections.matches:
        raise EngineError("no images to compare on")
    tensors, detection_difference = heads.summary(), detections.summary()
    head_differences = tuple(one for one in tensors if is_head(one.name))
    between = tuple(one for one in tensors if not is_head(one.name))
    if not head_differences and not detection_difference.first + detection_difference.second:
        raise EngineError(
            "nothing to compare: no common head tensors, nothing detected; take real images"
        )
    precision = None if truth is None else detections.precision(truth)
    return Comparison(
        len(detections.matches),
        head_differences,
        detection_difference,
        precision,
        tuple(_checks(head_differences, detection_difference, precision, tolerance, between)),
        between,
    )


class _Heads:
    """Polygraphy compare function for the head tensors; keeps their metrics."""

    def __init__(self) -> None:
        self._snr = SnrCompareFunc()
        # the verdict is ours: Polygraphy only measures
        self._difference = SimpleCompareFunc(atol=math.inf, rtol=math.inf, check_error_stat="max")
        self._metrics: dict[str, list[list[float]]] = {}

    def __call__(self, first: IterationResult, second: IterationResult) -> dict[str, bool]:
        names, others = ([n for n in side if n not in ROWS] for side in (first, second))
        if not names or not others:  # a built engine does not show its heads
            return {}
        if set(names) != set(others):
            raise EngineError(
                f"heads {names} and {others} are not the same ones: these are different networks"
            )
        for name in names:
            if first[name].shape != second[name].shape:
                raise EngineError(
                    f"head tensor {name} is {list(first[name].shape)} on the first side and "
                    f"{list(second[name].shape)} on the second: these are different networks"
                )
        sides = [
            IterationResult({name: side[name] for name in names}, side.runtime, side.runner_name)
            for side in (first, second)
        ]
        snr, difference = self._snr(*sides), self._difference(*sides)
        for name in names:
            found = difference[name]
            values = [snr[name].snr, found.max_absdiff, found.mean_absdiff, found.median_reldiff]
            self._metrics.setdefault(name, []).append([float(value) for value in values])
        return dict.fromkeys(names, True)

    def summary(self) -> tuple[HeadDifference, ...]:
        """All images together."""
        rows = []
        for name, metrics in self._metrics.items():
            snr, largest, mean, relative = np.array(metrics).T
            rows.append(
                HeadDifference(
                    name,
                    float(np.median(snr)),
                    float(snr.min()),
                    int(snr.argmin()),
                    float(largest.max()),
                    float(mean.mean()),
                    float(relative.mean()),
                )
            )
        return tuple(rows)


class _Detections:
    """Polygraphy compare function for the detections; keeps them and their pairs."""

    def __init__(self) -> None:
        self.matches: list[Matches] = []
        self._rows: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])

    def __call__(self, first: IterationResult, second: IterationResult) -> dict[str, bool]:
        found = []
        for side, kept in zip((first, second), self._rows, strict=True):
            (rows,), (count,) = (side[name] for name in ROWS)
            rows = rows[:count].copy()
            rows[:, 0] = len(self.matches)
            kept.append(rows)
            found.append(rows)
        self.matches.append(match_detections(*found))
        return {ROWS[0]: True}

    def summary(self) -> DetectionDifference:
        """All images together."""
        iou = np.concatenate([match.iou for match in self.matches])
        score = np.abs(np.concatenate([match.score_difference for match in self.matches]))
        matched = len(iou)
        missed = sum(match.missed for match in self.matches)
        extra = sum(match.extra for match in self.matches)
        return DetectionDifference(
            matched + missed,
            matched + extra,
            matched,
            missed,
            extra,
            float(iou.mean()) if matched else math.nan,
            float(score.max(initial=0)),
        )

    def precision(self, truth: Truth) -> tuple[float, float]:
        """Return the mAP of both sides; NaN where the images have no ground truth."""
        categories = len(truth.content["categories"])
        found = []
        for kept in self._rows:
            rows = np.concatenate(kept)
            for label in (rows[:, 6].min(initial=np.inf), rows[:, 6].max(initial=-np.inf)):
                if len(rows) and not 0 <= label - truth.first_label < categories:
                    raise EngineError(
                        f"label {label:g} was detected, the annotations have {categories} "
                        f"categories, the first of label {truth.first_label}"
                    )
            rows[:, 6] += 1 - truth.first_label
            value = coco_stats(truth.content, truth.images, rows)["AP"]
            found.append(value if value >= 0 else math.nan)
        return found[0], found[1]


def _checks(
    heads: Sequence[HeadDifference],
    detections: DetectionDifference,
    precision: tuple[float, float] | None,
    tolerance: Tolerance,
    layers: Sequence[HeadDifference],
) -> Iterator[Check]:
    # `not >=`: a NaN must be found
    if left := next((one for one in layers if not one.snr_median >= tolerance.snr), None):
        what = f"first tensor out of tolerance, {left.name}: median SNR in dB"
        yield Check(what, left.snr_median, tolerance.snr, True)
    if heads:
        # not min(): a NaN must come through
        worst = float(np.min([head.snr_median for head in heads]))
        yield Check("worst head, median SNR in dB", worst, tolerance.snr, True)
    yield Check("share of detections matched", detections.share, tolerance.matched, True)
    yield Check("largest difference in score", detections.score_largest, tolerance.score, False)
    if precision is not None and not math.isnan(precision[0]):
        bound = tolerance.precision * precision[0]
        yield Check("mAP of the second side", precision[1], bound, True)

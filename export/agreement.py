"""The proof of an export: PyTorch and ONNX Runtime say the same of the same images and heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.errors import ExportError
from export.onnx_export import DETECTION_OUTPUTS, Detector, head_outputs, without_heads
from export.postprocess import PostProcess
from graph_surgery.rounding import Undecided, compare, undecided

Floats = NDArray[np.float32]

HEAD_TOLERANCE = 1e-4
"""Largest head difference between PyTorch and ONNX Runtime, relative to the heads' spread."""

_BATCH = 2
"""Images that are run at a time; a RetinaNet of 264 classes has 130 MB of logits an image."""


@dataclass(frozen=True)
class Agreement:
    """How far PyTorch and ONNX Runtime are apart.

    Attributes
    ----------
    loc, conf
        Largest head difference on the same images, over the heads' spread (largest minus
        smallest value).
    detections
        Detections on the images of the check.
    box, score
        Largest difference of a normalised coordinate and of a score, from the same heads.
    """

    loc: float
    conf: float
    detections: int
    box: float
    score: float


def _check_images(shape: tuple[int, int]) -> Floats:
    """Smooth seeded noise with the mean and deviation of a normalised photograph."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(_BATCH, 3, *(max(side // 25, 2) for side in shape))))
    images = nn.functional.interpolate(coarse, shape, mode="bicubic").numpy()
    return np.asarray(images, np.float32)


def _run(
    model: onnx.ModelProto, inputs: dict[str, Floats], outputs: Sequence[str]
) -> list[NDArray[Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(list(outputs), inputs))


def _joined(postprocess: PostProcess, heads: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Head tensors, all loc before all conf, to [N, 4, P] and [N, C, P]."""
    levels = [torch.from_numpy(head) for head in heads]
    loc, conf = levels[: len(levels) // 2], levels[len(levels) // 2 :]
    classes = postprocess.config.num_classes
    return postprocess.join(loc, 4).numpy(), postprocess.join(conf, classes).numpy()


def compare_with_onnxruntime(detector: Detector, model: onnx.ModelProto) -> Agreement:
    """Run both on smooth noise: compare the heads, then the detections from the same heads.

    Raises
    ------
    ExportError
        When heads or detections differ by more than the tolerances.
    """
    loc, conf, apart = _compare_heads(detector, model)
    # From the same heads: rounding in the heads may tip a box over a threshold, which would say
    # nothing about the postprocess. An untrained model saturates its scores, and rounding decides
    # among those that are all 1: temper its logits.
    conf *= min(1.0, 4.0 / float(conf.std()))
    box = score = 0.0
    detections = 0
    for heads in itertools.chain([(loc, conf)], _tied_heads(detector.postprocess)):
        outcome = compare_detections(detector, model, *heads)
        box, score = max(box, outcome[0]), max(score, outcome[1])
        detections += outcome[2]
    return Agreement(apart[0], apart[1], detections, box, score)


def _compare_heads(
    detector: Detector, model: onnx.ModelProto
) -> tuple[Floats, Floats, tuple[float, ...]]:
    """Joined head tensors of ONNX Runtime on smooth noise, and how far PyTorch's are from them."""
    config, postprocess = detector.model.config, detector.postprocess
    images = _check_images(config.image_shape)
    with torch.inference_mode():
        loc_levels, conf_levels = detector.model(torch.from_numpy(images))
    expected = _joined(postprocess, [t.numpy() for t in (*loc_levels, *conf_levels)])
    *shipped_heads, shipped, shipped_count = _run(
        model, {"image": images}, [*head_outputs(config), *DETECTION_OUTPUTS]
    )
    alone = _run(without_heads(model), {"image": images}, DETECTION_OUTPUTS)
    if not all(np.array_equal(*pair) for pair in zip((shipped, shipped_count), alone, strict=True)):
        raise ExportError("the file without the extra head outputs gives other detections")
    loc, conf = _joined(postprocess, shipped_heads)
    apart = tuple(
        float(np.abs(actual - wanted).max() / np.ptp(wanted))
        for actual, wanted in zip((loc, conf), expected, strict=True)
    )
    for name, difference in zip(("loc", "conf"), apart, strict=True):
        if not difference <= HEAD_TOLERANCE:
            raise ExportError(
                f"ONNX Runtime and PyTorch differ in {name} by {difference:.1e} of its spread; "
                f"at most {HEAD_TOLERANCE:.0e} is rounding"
            )
    return loc, conf, apart


def _tied_heads(postprocess: PostProcess) -> Iterator[tuple[Floats, Floats]]:
    """Seeded heads [N, 4, P] and [N, C, P] on which every rule decides.

    Runs of neighbouring priors show one class each, with few different scores, some near the
    threshold; so neighbours overlap and many scores are equal. One image has more candidates of a
    class, or of a level, and survivors, than count; those before it have room for all. Where levels
    are cut, the last crowds more candidates around the middle of its finest level than count, so
    that few survive and the cut is seen.
    """
    rng, config, rules = np.random.default_rng(1), postprocess.config, postprocess.rules
    count, classes = config.num_priors, config.num_classes
    near = [rules.threshold * 0.98, rules.threshold * 1.02]
    logits = postprocess.logits(np.concatenate([near, np.linspace(0.1, 0.95, 12)]))
    run = 8
    few = rules.keep // run
    shown = np.arange(int(postprocess.background), min(classes, 5))
    for counts in ([few, few], [few, few], [count // run]):
        loc = rng.normal(0, 0.5, (len(counts), 4, count)).astype(np.float32)
        if postprocess.bound:  # one edge of a box that is too large lies where it would without
            far = rng.random((len(counts), 2, count)) < 0.02
            loc[:, 2:][far] = postprocess.bound + 2
            loc[:, :2][far] += np.exp(postprocess.bound) / 2
        conf = np.full((len(counts), classes, count), postprocess.silent, np.float32)
        for image, runs in enumerate(counts):
            for start in run * rng.choice(count // run, runs, replace=False):
                label = rng.choice(shown)
                conf[image, label, start : start + run] = rng.choice(logits, run)
        yield loc, conf
    if rules.level_top_k:
        loc = rng.normal(0, 0.2, (1, 4, count)).astype(np.float32)
        conf = np.full((1, classes, count), postprocess.silent, np.float32)
        anchors, rows, columns = config.levels[0]
        boxes = postprocess.decode(torch.zeros(1, 4, count)).numpy()[0, : anchors * rows * columns]
        from_middle = np.abs(boxes[:, :2] + boxes[:, 2:] - 1).max(axis=1)
        crowd = from_middle.argsort(kind="stable")[: rules.level_top_k]
        for label in shown[:2]:
            conf[0, label, crowd] = rng.choice(logits, len(crowd))
        yield loc, conf


def compare_detections(
    detector: Detector, model: onnx.ModelProto, loc: Floats, conf: Floats
) -> tuple[float, float, int]:
    """Run both postprocesses on the same heads.

    Parameters
    ----------
    loc, conf
        [N, 4, P] and [N, C, P].

    Returns
    -------
    Largest difference of a normalised coordinate, of a score; number of detections.

    Raises
    ------
    ExportError
        When detections differ by more than rounding.
    """
    postprocess, config = detector.postprocess, detector.model.config
    loc_levels, conf_levels = postprocess.split(loc), postprocess.split(conf)
    names = head_outputs(config)
    # The tail takes the batch size from the image.
    tail = onnx.utils.Extractor(model).extract_model(["image", *names], [*DETECTION_OUTPUTS])
    made = [n.output[0] for n in tail.graph.node if n.op_type == postprocess.activation]
    tail.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    images = np.zeros((len(loc), 3, *config.image_shape), np.float32)
    feed = {"image": images, **dict(zip(names, [*loc_levels, *conf_levels], strict=True))}
    *found, ort_scores = _run_scores(tail, feed, made)
    with torch.inference_mode():
        heads = [[torch.from_numpy(level) for level in part] for part in (loc_levels, conf_levels)]
        wanted = [t.numpy() for t in postprocess(*heads)]
    differences = []
    for image in range(len(images)):
        rows, expected = (part[0][image, : part[1][image], 1:] for part in (found, wanted))

        def doubtful(image: int = image) -> Undecided:
            return _undecided(postprocess, loc[image], conf[image], ort_scores[image])

        outcome = compare(rows, expected, doubtful)
        for lone, one, other in (
            (outcome.lacking, "PyTorch", "ONNX Runtime"),
            (outcome.excess, "ONNX Runtime", "PyTorch"),
            (outcome.disordered, "ONNX Runtime", "its place"),
        ):
            if len(lone):
                raise ExportError(f"{one}'s detection {lone[0].tolist()} has no equal in {other}")
        differences.append(outcome.differences)
    largest = np.concatenate(differences).max(axis=0, initial=0.0)
    return float(largest[:4].max()), float(largest[4]), int(wanted[1].sum())


def _run_scores(
    tail: onnx.ModelProto, feed: dict[str, Floats], scores: Sequence[str]
) -> list[NDArray[Any]]:
    """Detections, their numbers, and the scores [N, C, P] of all levels."""
    detections, count, *levels = _run(tail, feed, [*DETECTION_OUTPUTS, *scores])
    return [detections, count, np.concatenate(levels, axis=2)]


def _undecided(
    postprocess: PostProcess, loc: Floats, conf: Floats, ort_scores: Floats
) -> Undecided:
    """What hangs on rounding in an image of heads [4, P] and [C, P]."""
    logits = torch.from_numpy(conf)
    scores: Tensor = logits.softmax(0) if postprocess.activation == "Softmax" else logits.sigmoid()
    known = scores.numpy()
    same = known.view(np.uint32).astype(np.int64) << 32 | ort_scores.view(np.uint32)
    if postprocess.background:
        known[0] = -1  # the background is not detected
    boxes = postprocess.decode(torch.from_numpy(loc)[None])[0].numpy()
    sizes = [anchors * rows * columns for anchors, rows, columns in postprocess.config.levels]
    return undecided(boxes, known, same, postprocess.rules, sizes)

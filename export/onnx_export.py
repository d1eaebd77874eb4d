"""SSD-ResNet34 with its postprocess to one ONNX file, and the proof that both say the same."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.checkpoint import CONFIG_KEY, Checkpoint
from export.config import SSDConfig
from export.errors import ExportError
from export.model import SSDResNet34
from export.postprocess import (
    IOU_THRESHOLD,
    SCORE_THRESHOLD,
    TOP_K,
    PostProcess,
    join_levels,
)
from graph_surgery.names import NAMES_KEY
from graph_surgery.rounding import Rules, compare, undecided

Floats = NDArray[np.float32]

OPSET = 18
DETECTION_OUTPUTS = ("detections", "num_detections")
HEAD_OUTPUTS = ("loc", "conf")
"""Extra outputs [N, 4, P] and [N, C, P] that the check reads and the file does not keep."""

HEAD_TOLERANCE = 1e-4
"""Largest head difference between PyTorch and ONNX Runtime, relative to the heads' spread."""

RULES = Rules(SCORE_THRESHOLD, IOU_THRESHOLD, TOP_K, TOP_K)


class Detector(nn.Module):
    """Image to detections, and the joined head tensors for the check."""

    def __init__(self, model: SSDResNet34) -> None:
        super().__init__()
        self.model = fold_batch_norms(model)
        self.postprocess = PostProcess(model.config)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[N, 3, S, S] to detections, num_detections, loc [N, 4, P], conf [N, C, P]."""
        loc, conf = self.model(image)
        detections, num_detections = self.postprocess(loc, conf)
        num_classes = self.model.config.num_classes
        return detections, num_detections, join_levels(loc, 4), join_levels(conf, num_classes)


def fold_batch_norms(model: SSDResNet34) -> SSDResNet34:
    """Return a copy in eval mode in which every BatchNorm is folded into its convolution."""
    model = deepcopy(model).eval()
    for module in list(model.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX for the two custom operators of `postprocess`."""
    import onnxscript

    op: Any = onnxscript.opset18  # its stubs do not know that Python numbers are promoted

    def topk(values: Any, k: int) -> Any:
        # ONNX TopK: of equal values the one with the lower index comes first.
        return op.TopK(values, op.Constant(value_ints=[k]), axis=-1)

    def nms(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
        rows = op.Shape(scores)
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Gather(rows, op.Constant(value_ints=[1])),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )  # [kept, 3]: row, class (always 0), box
        where = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_int=1), op.Shape(selected, start=0, end=1))
        zeros = op.Expand(op.Constant(value_int=0), rows)
        return op.Cast(op.ScatterND(zeros, where, ones), to=onnx.TensorProto.BOOL)

    ops = torch.ops.ssd_resnet34
    return {ops.stable_topk.default: topk, ops.greedy_nms.default: nms}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress chatter off the user's screen."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def export_detector(detector: Detector) -> onnx.ModelProto:
    """Export to ONNX opset 18 with a dynamic batch.

    Returns
    -------
    Input ``image`` float32 [batch, 3, S, S]; outputs ``detections`` float32 [batch, 200, 7],
    ``num_detections`` int32 [batch] and the two `HEAD_OUTPUTS`. Checked by onnx.checker.

    Raises
    ------
    ExportError
        When the exported graph is not a valid ONNX model.
    """
    size = detector.model.config.image_size
    with _quiet():
        program = torch.onnx.export(
            detector,
            (torch.zeros(2, 3, size, size),),
            input_names=["image"],
            output_names=[*DETECTION_OUTPUTS, *HEAD_OUTPUTS],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=_translations(),
            verbose=False,
        )
    if program is None:
        raise ExportError("the exporter returned no model")
    model = program.model_proto
    for node in model.graph.node:  # the exporter's trace of Python files: paths of this machine
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is invalid: {error}") from error
    return model


def without_heads(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the outputs that only the check needs, and the nodes that made only them."""
    slim = onnx.utils.Extractor(model).extract_model(["image"], [*DETECTION_OUTPUTS])
    slim.producer_name, slim.producer_version = model.producer_name, model.producer_version
    onnx.checker.check_model(slim, full_check=True)
    return slim


def metadata(checkpoint: Checkpoint, config_json: str, names: Sequence[str]) -> dict[str, str]:
    """Metadata of a file: what it is made from, and its class names if it has any."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("ssd-resnet34-trt")
    except PackageNotFoundError:  # run from a checkout
        ours = "not installed"
    return {
        CONFIG_KEY: config_json,
        "weights_sha256": checkpoint.sha256,
        **({"weights_entry": checkpoint.keys} if checkpoint.keys else {}),
        "ssd_resnet34_trt_version": ours,
        **({NAMES_KEY: json.dumps(names)} if names else {}),
    }


def check_record(path: Path, facts: Mapping[str, str]) -> None:
    """Refuse a file whose metadata tells that it was made from something else.

    Raises
    ------
    ExportError
        When it has other metadata, or is no ONNX file.
    """
    found = None
    with contextlib.suppress(DecodeError, OSError):
        model = onnx.load(path, load_external_data=False)
        found = {entry.key: entry.value for entry in model.metadata_props}
    if found != facts:
        raise ExportError(f"{path}: exists already, and is another: remove it or pass --force")


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


def _check_images(size: int, count: int) -> Floats:
    """Smooth seeded noise with the mean and deviation of a normalised photograph."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(count, 3, size // 25, size // 25)))
    images = nn.functional.interpolate(coarse, (size, size), mode="bicubic").numpy()
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


def compare_with_onnxruntime(detector: Detector, model: onnx.ModelProto) -> Agreement:
    """Run both on smooth noise: compare the heads, then the detections from the same heads.

    Raises
    ------
    ExportError
        When heads or detections differ by more than the tolerances.
    """
    images = _check_images(detector.model.config.image_size, 2)
    with torch.inference_mode():
        expected_heads = [t.numpy() for t in detector(torch.from_numpy(images))[2:]]
    *shipped, loc_joined, conf_joined = _run(
        model, {"image": images}, [*DETECTION_OUTPUTS, *HEAD_OUTPUTS]
    )
    actual_heads = [loc_joined, conf_joined]
    alone = _run(without_heads(model), {"image": images}, DETECTION_OUTPUTS)
    if not all(np.array_equal(a, b) for a, b in zip(shipped, alone, strict=True)):
        raise ExportError("the file without the extra head outputs gives other detections")
    loc, conf = (
        float(np.abs(a - e).max() / np.ptp(e))
        for a, e in zip(actual_heads, expected_heads, strict=True)
    )
    for name, difference in (("loc", loc), ("conf", conf)):
        if not difference <= HEAD_TOLERANCE:
            raise ExportError(
                f"ONNX Runtime and PyTorch differ in {name} by {difference:.1e} of its spread; "
                f"at most {HEAD_TOLERANCE:.0e} is rounding"
            )
    # From the same heads: rounding in the heads may tip a box over a threshold, which would say
    # nothing about the postprocess. An untrained model saturates the softmax, and rounding decides
    # among scores that are all 1: temper its logits.
    tempered = [actual_heads[0], actual_heads[1] * min(1.0, 4.0 / float(actual_heads[1].std()))]
    heads = [
        np.concatenate(parts)
        for parts in zip(tempered, _tied_heads(detector.model.config), strict=True)
    ]
    box, score, detections = compare_detections(detector, model, *heads)
    return Agreement(loc, conf, detections, box, score)


def _tied_heads(config: SSDConfig) -> tuple[Floats, Floats]:
    """Seeded heads [N, 4, P] and [N, C, P] on which every rule decides.

    Runs of neighbouring priors show one class each, with few different scores, some near the
    threshold; so neighbours overlap and many scores are equal. The last image has more candidates
    of a class, and survivors, than count; the others have room for all.
    """
    rng, count = np.random.default_rng(1), config.num_priors
    near = [SCORE_THRESHOLD * 0.98, SCORE_THRESHOLD * 1.02]
    scores = np.concatenate([near, np.linspace(0.1, 0.95, 12)])
    logits = np.log(scores / (1 - scores) * (config.num_classes - 1))
    run = 8
    runs_of_image = [TOP_K // run] * 4 + [count // run]
    loc = rng.normal(0, 0.5, (len(runs_of_image), 4, count))
    conf = np.zeros((len(loc), config.num_classes, count))
    for image, runs in enumerate(runs_of_image):
        for start in run * rng.choice(count // run, runs, replace=False):
            label = rng.integers(1, min(config.num_classes, 5))
            conf[image, label, start : start + run] = rng.choice(logits, run)
    return loc.astype(np.float32), conf.astype(np.float32)


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
    # The tail takes the batch size from the image.
    tail = onnx.utils.Extractor(model).extract_model(["image", *HEAD_OUTPUTS], [*DETECTION_OUTPUTS])
    softmax = next(node.output[0] for node in tail.graph.node if node.op_type == "Softmax")
    tail.graph.output.append(onnx.ValueInfoProto(name=softmax))
    size = detector.model.config.image_size
    images = np.zeros((len(loc), 3, size, size), np.float32)
    feed = {"image": images, **dict(zip(HEAD_OUTPUTS, (loc, conf), strict=True))}
    *found, ort_scores = _run(tail, feed, [*DETECTION_OUTPUTS, softmax])
    with torch.inference_mode():
        postprocess, levels = (
            detector.postprocess,
            [[torch.from_numpy(part)] for part in (loc, conf)],
        )
        wanted = [t.numpy() for t in postprocess(*levels)]
        boxes, scores = postprocess.decode(levels[0][0]).numpy(), levels[1][0].softmax(1).numpy()
    same = scores.view(np.uint32).astype(np.int64) << 32 | ort_scores.view(np.uint32)
    scores[:, 0] = -1  # the background is not detected
    differences = []
    for image in range(len(images)):
        rows, expected = (part[0][image, : part[1][image], 1:] for part in (found, wanted))
        doubtful = functools.partial(undecided, boxes[image], scores[image], same[image], RULES)
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

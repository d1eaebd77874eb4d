"""The proof of a surgery: the old tail and the new node, run on the same head tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.heads import HeadRunner
from graph_surgery.nms_function import DOMAIN, OP_TYPE, OUTPUTS
from graph_surgery.probe import OPERATOR_BOXES, TOLERANCE, activate, decode
from graph_surgery.protobuf import Arrays, Runner, inputs, one_line, opset_of, part, reads
from graph_surgery.rounding import CORNER, NOTHING, Rules, Undecided, compare, undecided
from graph_surgery.rows import read_rows
from graph_surgery.samples import proof_images
from graph_surgery.tail import DetectionTail

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BOXES = f"{DOMAIN}.{OP_TYPE}.{OPERATOR_BOXES.name}"
"""The operator's boxes before it clips them, [N, 4, P], given away for the proof."""

LARGE = 2**23
"""Scores of an image from which on no more than two images run at once, for their memory."""

NETWORK_TOLERANCE = 1e-4
"""Largest difference of a head tensor relative to its spread: float32 through some 50 layers."""


@dataclass(frozen=True)
class Agreement:
    """What both tails said.

    Attributes
    ----------
    images, detections
        How many were compared; the same number of detections on both sides.
    difference
        Largest difference of a score or a coordinate.
    box_order
        How the old outputs write a box.
    pixels
        Whether they give it in pixels.
    """

    images: int
    detections: int
    difference: float
    box_order: str
    pixels: bool


_BOX_COLUMNS = {"ymin, xmin, ymax, xmax": (0, 1, 2, 3), "xmin, ymin, xmax, ymax": (1, 0, 3, 2)}
"""Where the corners of the new rows stand in the old ones."""


def verify_tail(old: onnx.ModelProto, new: onnx.ModelProto, tail: DetectionTail) -> Agreement:
    """Run the old tail and the new node on the head tensors of `samples`.

    They must agree on every box before it is clipped (where the old tail has them all), on every
    detection and on the order of detections, but for what hangs on rounding (`rounding`). What NaN
    and infinity do is not compared, nor which of two equal scores comes first where the graph
    orders priors in another way than the operator.

    Raises
    ------
    SurgeryError
        When a row of one has no equal in the other, or the old outputs are not understood.
    """
    heads = tail.heads
    images = proof_images(tail)
    scores = heads.num_classes * heads.num_priors
    batch = heads.batch or (len(images) if scores < LARGE else 2)
    decoded = [] if tail.attributes.levelTopK else [tail.decoded.name]
    run_old = HeadRunner(old, heads, [*tail.outputs, *decoded])
    run_new = HeadRunner(_with_boxes(new), heads, [*OUTPUTS, BOXES])
    pairs: list[tuple[Floats, Floats]] = []
    for start in range(0, len(images), batch):
        chosen = [images[index % len(images)] for index in range(start, start + batch)]
        loc, conf = (np.stack(part) for part in zip(*chosen, strict=True))
        made, made_anew = run_old(*heads.arrange(loc, conf)), run_new(loc, conf)
        boxes = made_anew.pop(BOXES)
        for name in decoded:
            _same_boxes(tail, made[name], boxes)
        old_rows = read_rows({name: made[name] for name in tail.outputs})
        new_rows = read_rows(made_anew)
        if len(old_rows) != len(new_rows):
            raise SurgeryError(
                f"the graph gives detections of {len(old_rows)} images for a batch of "
                f"{len(new_rows)}: its postprocessing is made for one image; export with batch 1"
            )
        if any((rows[:, 0] != index).any() for index, rows in enumerate(old_rows)):
            raise SurgeryError(
                f"the graph and {OP_TYPE} disagree: the first column of detections is not the "
                "index of their image in the batch"
            )
        pairs += zip(old_rows, new_rows, strict=True)
    units = [(1, 1)] if tail.image is None else [(1, 1), tail.image]
    readings = []
    for (order, columns), unit in itertools.product(_BOX_COLUMNS.items(), units):
        read = [(_read(rows, columns, unit), new_rows[:, 1:]) for rows, new_rows in pairs]
        wrong = sum(compare(*rows, lambda: NOTHING).faults for rows in read)
        readings.append((wrong, order, unit != (1, 1), read))
    _, order, pixels, read = min(readings, key=lambda reading: reading[0])
    differences = [0.0]
    for index, (before, after) in enumerate(read):
        image = map(run_old.given, images[index % len(images)])
        outcome = compare(before, after, functools.partial(_undecided, tail, *image))
        if outcome.faults and any(_but_for_labels(one) for *_, one in readings):
            raise SurgeryError(
                f"the graph and {OP_TYPE} disagree on labels alone: the operator gives the index "
                "of a class, background counted; export without another offset or table of labels"
            )
        if outcome.faults:
            raise SurgeryError(
                f"the graph and {OP_TYPE} disagree on the same head tensors: {len(before)} and "
                f"{len(after)} detections, of which {outcome.faults} have no equal in their place "
                f"(image {index} of the check); the tail does something that the operator does not"
            )
        differences.append(float(outcome.differences.max(initial=0.0)))
    detections = sum(len(after) for _, after in read)
    if not detections:
        raise SurgeryError(
            "nothing on the check's images scores above "
            f"{tail.attributes.confidenceThreshold}: the surgery cannot be proved"
        )
    return Agreement(len(pairs), detections, max(differences), order, pixels)


def _with_boxes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose NMS_OPT_TRT also gives its boxes before they are clipped."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    for function in new.functions:
        if (function.domain, function.name) == (DOMAIN, OP_TYPE):
            function.output.append(OPERATOR_BOXES.name)
    for node in new.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            node.output.append(BOXES)
    return new


def _same_boxes(tail: DetectionTail, before: Floats, after: Floats) -> None:
    """Compare the graph's decoded boxes with the operator's [N, 4, P], neither clipped."""
    old = tail.decoded.corners(before, tail.heads.order)
    new = OPERATOR_BOXES.corners(after, np.arange(after.shape[2]))
    if len(old) != len(new):
        raise SurgeryError(
            f"the graph decodes boxes of {len(old)} images for a batch of {len(new)}: its "
            "postprocessing is made for one image; export with batch 1"
        )
    off = np.abs(new - old) / np.maximum(1, np.abs(old))
    if not (off <= TOLERANCE).all():
        image, prior, _ = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape)
        raise SurgeryError(
            f"the graph and {OP_TYPE} disagree on boxes before they are clipped: of prior {prior}, "
            f"{old[image, prior].round(6).tolist()} and {new[image, prior].round(6).tolist()} "
            "(ltrb in fractions of the image)"
        )


def _read(rows: Floats, columns: tuple[int, ...], unit: tuple[int, int]) -> Floats:
    """Rows [n, 7] of the old tail as the new node writes them, without the index of the image."""
    boxes = rows[:, 1:5][:, columns] / np.array([unit[1], unit[0]] * 2, np.float32)
    return np.column_stack([boxes.clip(0, 1), rows[:, 5:]])


def _undecided(tail: DetectionTail, loc: Floats, conf: Floats) -> Undecided:
    """What hangs on rounding, from deltas [4, P] and logits [C, P]."""
    priors, variances = tail.priors.astype(np.float64).reshape(2, -1, 4)
    a = tail.attributes
    boxes = decode(priors, variances, loc.T.astype(np.float64), a.bboxXformClip)
    sigmoid = tail.attributes.confSigmoid == 1
    scores = activate(conf.astype(np.float64), sigmoid=sigmoid)
    if tail.attributes.backgroundLabelId >= 0:
        scores[tail.attributes.backgroundLabelId] = -1
    same = np.unique(conf, return_inverse=True)[1].reshape(conf.shape)
    if not sigmoid:  # equal logits are sure of equal scores among equal ones alone
        column = np.unique(conf, axis=1, return_inverse=True)[1].reshape(-1)
        same = column * (same.max() + 1) + same
    rules = Rules(
        a.confidenceThreshold,
        a.nmsThreshold,
        a.topK,
        a.keepTopK,
        a.levelTopK,
        clip=a.clipBeforeNms == 1,
        corner=CORNER * (a.numClasses + 1) if tail.by_offset else CORNER,
    )
    levels = [level.priors for level in tail.heads.levels]
    return undecided(boxes, scores, same, rules, levels)


def _but_for_labels(pairs: Sequence[tuple[Floats, Floats]]) -> bool:
    """Whether old and new rows [n, 6] are the same in all but their last column."""
    but_last = np.array([1, 1, 1, 1, 1, 0], np.float32)
    return not any(compare(a * but_last, b * but_last, lambda: NOTHING).faults for a, b in pairs)


def same_network(old: onnx.ModelProto, new: onnx.ModelProto, names: Sequence[str]) -> bool:
    """Whether two models make some tensors by the very same nodes, of one opset, and constants."""
    one, other = (part(model, inputs(model), names).graph for model in (old, new))
    return opset_of(old) == opset_of(new) and bool(one == other)


def verify_network(
    old: onnx.ModelProto,
    new: onnx.ModelProto,
    names: Sequence[str],
    batch: int,
    *,
    runs: int,
    channels: Mapping[str, NDArray[np.intp]] = MappingProxyType({}),
    images: Container[str] = (),
    normalised: Mapping[str, tuple[Doubles, Doubles]] = MappingProxyType({}),
) -> float:
    """Run the networks in front of the heads on random images.

    Parameters
    ----------
    names
        Tensors to compare, of both models.
    batch
        Images in a run of the old network.
    runs
        Runs of the old network, on as many images as the new one takes in one run.
    channels
        Tensors whose channels the new network has in another order: which of the old ones each is.
    images
        Inputs [N, H, W, C] of the old network that are [N, C, H, W] now.
    normalised
        Scale and shift, [C] each, of inputs x that the new network takes as scale * x + shift.

    Returns
    -------
    Largest difference of a tensor, relative to its spread; of one number, to its size.

    Raises
    ------
    SurgeryError
        When it is more than rounding, or a network fails.
    """
    rng = np.random.default_rng(0)
    feeds: list[Arrays] = []
    for _ in range(runs):
        feeds.append({})
        for given in inputs(old):
            tensor = given.type.tensor_type
            shape = [size.dim_value or batch for size in tensor.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            drawn = rng.normal(size=shape)  # as the new network takes it
            if given.name in normalised:
                scale, shift = _by_channel(given.name, normalised, images)
                drawn = (drawn - shift) / scale
            feeds[-1][given.name] = drawn.astype(dtype)
    run_old, run_new = (Runner(part(model, inputs(model), names)) for model in (old, new))
    moving = {given.name for given in inputs(old)}
    for node in old.graph.node:
        if moving.intersection(reads(node)):
            moving.update(node.output)
    expected = _joined([run_old(feed) for feed in feeds], moving)
    left = {given.name for given in inputs(new)}
    expected |= {name: expected[name][:, places] for name, places in channels.items()}
    joined = _joined(feeds, moving)
    for name in normalised:
        scale, shift = _by_channel(name, normalised, images)
        joined[name] = (joined[name] * scale + shift).astype(joined[name].dtype)
    actual = run_new(
        {
            name: value.transpose(0, 3, 1, 2) if name in images else value
            for name, value in joined.items()
            if name in left
        }
    )
    differences = [0.0]
    for name, value in expected.items():
        if value.shape != actual[name].shape:
            raise SurgeryError(
                f"tensor {name!r} is {list(actual[name].shape)}, not {list(value.shape)}"
            )
        if value.dtype.kind not in "biuf" or not value.size:
            if (value != actual[name]).any():
                raise SurgeryError(f"tensor {name!r} changes")
            continue
        before, after = value.astype(np.float64), actual[name].astype(np.float64)
        spread = np.ptp(before) or np.abs(before).max() or np.finfo(np.float32).tiny
        differences.append(np.abs(after - before).max() / spread)
    worst = float(np.max(differences))  # unlike max, it lets a NaN through
    if not worst <= NETWORK_TOLERANCE:
        raise SurgeryError(f"the network's outputs change by {worst:.2g} of their spread")
    return worst


def _by_channel(
    name: str, maps: Mapping[str, tuple[Doubles, Doubles]], last: Container[str]
) -> tuple[Doubles, Doubles]:
    """Scale and shift of an image, as they are applied to [N, C, H, W], or to [N, H, W, C]."""
    scale, shift = maps[name]
    shape = -1 if name in last else (-1, 1, 1)
    return scale.reshape(shape), shift.reshape(shape)


def _joined(parts: Sequence[Arrays], moving: Container[str]) -> Arrays:
    """Batches one after the other, of tensors that depend on the images; others once."""
    if len(parts) == 1:
        return parts[0]
    try:
        return {
            name: np.concatenate([part[name] for part in parts]) if name in moving else first
            for name, first in parts[0].items()
        }
    except ValueError as error:
        raise SurgeryError(f"an output is no batch: {one_line(error)}") from error

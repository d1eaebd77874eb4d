"""Reading a tail that cuts each level to its best candidates before suppression, as RetinaNet's.

Found by structure: between ten convolutions, or two for each of so many levels, and the one
NonMaxSuppression, which may lie within an If, stands a TopK for each level. All else is found by
experiment (`candidates`, `geometry`), and proved as any surgery is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_surgery.candidates import Candidates, places
from graph_surgery.errors import SurgeryError
from graph_surgery.geometry import Geometry, read_geometry
from graph_surgery.graph import describe, downstream, output_names, reads, shape_of, upstream
from graph_surgery.heads import HeadRunner, Heads
from graph_surgery.nms_function import OP_TYPE, NmsAttributes
from graph_surgery.probe import Decoded, activate
from graph_surgery.rows import read_rows
from graph_surgery.tail import DetectionTail, image_size, threshold, upper_bound
from graph_surgery.walk import NMS, find_convs, find_heads, read_either_way, suppressions

_MANY = 4
"""Tensors of more values than so many a prior hold scores of all classes, not candidates."""

_STEPS = 256
"""Scores tried at once in search of a threshold."""


@dataclass(frozen=True)
class Cut:
    """A tail that cuts its levels, as far as its structure tells.

    Attributes
    ----------
    nms
        The suppression.
    part
        The graph that holds it, which may be a branch of `host`.
    host
        The node of the outer graph that is it, or holds it.
    """

    nms: gs.Node
    part: gs.Graph
    host: gs.Node


def find_cut(graph: gs.Graph) -> Cut | None:
    """Find a suppression of candidates that come from a TopK of each level; None without one."""
    if [node.op for node in suppressions(graph)] != [NMS]:
        return None
    for host in graph.nodes:
        branches = host.subgraphs(recursive=True) if host.op == "If" else []
        for part in [*([graph] if host.op == NMS else []), *branches]:
            nodes = [host] if part is graph else part.nodes
            for nms in (node for node in nodes if node.op == NMS):
                ends = list(reads(host))
                convs = find_convs(ends)
                names = [name for conv in convs for name in output_names(conv)]
                before = upstream(graph, ends, names)
                cuts = sum(node.op == "TopK" for node in before)
                if len(convs) > 2 and len(convs) % 2 == 0 and cuts >= len(convs) // 2:
                    return Cut(nms, part, host)
    return None


def read_cut(graph: gs.Graph, model: onnx.ModelProto, cut: Cut) -> DetectionTail:
    """Read the tail by experiment.

    Raises
    ------
    SurgeryError
        When it does what the operator does not, or is not understood.
    """
    errors = []
    for heads in _pairs(list(reads(cut.host)), describe(cut.nms)):
        try:
            found = places(HeadRunner(model, heads, _names(graph, cut, heads)), heads)
        except SurgeryError as error:
            errors.append(error)
            continue
        return _read(graph, model, cut, heads, found)
    raise errors[0]


def _pairs(ends: Sequence[gs.Tensor], what: str) -> list[Heads]:
    """Readings of the heads: loc and conf by the Concats that join them, else by their grids."""
    try:
        first, second = find_heads(ends, what)
    except SurgeryError:
        by_grid: dict[tuple[int | None, ...], list[gs.Tensor]] = {}
        for conv in find_convs(ends):
            by_grid.setdefault(tuple(shape_of(conv.outputs[0])[2:]), []).append(conv.outputs[0])
        if any(None in grid or len(both) != 2 for grid, both in by_grid.items()):
            raise
        grids = sorted(by_grid, key=lambda grid: -np.prod([size or 0 for size in grid]))
        pairs = [sorted(by_grid[grid], key=lambda head: shape_of(head)[1] or 0) for grid in grids]
        first, second = [one for one, _ in pairs], [one for _, one in pairs]
    return read_either_way(first, second)


def _read(
    graph: gs.Graph, model: onnx.ModelProto, cut: Cut, heads: Heads, found: Sequence[Candidates]
) -> DetectionTail:
    names = dict.fromkeys(name for place in reversed(found) for name in (place.scores, place.boxes))
    run = HeadRunner(model, heads, [*names])
    most = _cut(replace(found[0], run=run))
    image = image_size(model)
    geometry = read_geometry(run, heads, image, most)
    candidates = geometry.candidates
    layout = replace(candidates.heads.layout, by_cell=_by_cell(geometry))
    heads = replace(candidates.heads, layout=layout)
    levels = len(heads.levels)
    made = {n for node in downstream(graph, output_names(cut.host)) for n in output_names(node)}
    outputs = tuple(tensor.name for tensor in graph.outputs if tensor.name in made)
    cap = upper_bound(graph, cut.nms.inputs[2]) if len(cut.nms.inputs) > 2 else 0
    if cap is not None and cap < sum(min(most, level.priors) for level in heads.levels):
        raise SurgeryError(
            f"{describe(cut.nms)} keeps {cap} of a class; {OP_TYPE} keeps all that survive"
        )
    attributes = NmsAttributes(
        numClasses=heads.num_classes,
        topK=levels * most,
        keepTopK=_kept(model, geometry, outputs, most),
        confidenceThreshold=max(_threshold(candidates, most), threshold(cut.part, cut.nms, 4)),
        nmsThreshold=threshold(cut.part, cut.nms, 3),
        backgroundLabelId=-1,
        numLayers=levels,
        inputOrder=(0, levels, 2 * levels),
        confSigmoid=1,
        confSoftmax=0,
        levelTopK=most,
        clipBeforeNms=int(geometry.clips),
        bboxXformClip=geometry.bound,
    )
    planes = [geometry.priors.reshape(-1), np.tile(geometry.variances, heads.num_priors)]
    priors = np.stack(planes)[:, :, None].astype(np.float32)
    width, height = geometry.unit
    decoded = Decoded(candidates.boxes, candidates.form, (round(width), round(height)), layout)
    by_offset = heads.num_classes > 1 and _is_alone(cut)
    return DetectionTail(heads, priors, attributes, outputs, False, image, decoded, by_offset)


def _is_alone(cut: Cut) -> bool:
    """Whether suppression sees one class of scores; within an If their shape is not known."""
    shape = shape_of(cut.nms.inputs[1])
    return cut.host is not cut.nms or (len(shape) == 3 and shape[1] == 1)


def _names(graph: gs.Graph, cut: Cut, heads: Heads) -> list[str]:
    """Tensors that may hold candidates: computed from the heads, and not of all priors' scores."""
    behind = {id(node) for node in downstream(graph, heads.names)}
    found = []
    for node in upstream(graph, list(reads(cut.host)), heads.names):
        for tensor in node.outputs if id(node) in behind else ():
            shape = shape_of(tensor)
            known = shape and None not in shape
            if not tensor.is_empty() and not (
                known and np.prod([size or 0 for size in shape]) > _MANY * heads.num_priors
            ):
                found.append(tensor.name)
    return found


def _cut(candidates: Candidates) -> int:
    """How many of a level come in, measured on each level alone and then on all of them.

    Where no level is cut it is the size of the largest.
    """
    heads, rng = candidates.heads, np.random.default_rng(0)
    sizes = [heads.num_classes * level.priors for level in heads.levels]
    ends = np.cumsum([level.priors for level in heads.levels])

    def entering(first: int, last: int) -> int:
        logits = np.full((heads.num_classes, heads.num_priors), -30.0, np.float32)
        high = rng.uniform(2.0, 6.0, (heads.num_classes, last - first))
        logits[:, first:last] = high
        return int((candidates.entering(logits) > 0.5).sum())

    seen = [entering(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    cuts = [count for count, size in zip(seen, sizes, strict=True) if count < size]
    most = max(cuts or sizes)
    if seen != [min(most, size) for size in sizes]:
        raise SurgeryError(
            f"of levels of {_listed(sizes)} scores {_listed(seen)} come in: {OP_TYPE} cuts each "
            "level to the same number (levelTopK)"
        )
    together = entering(0, heads.num_priors)
    if together != sum(seen):
        raise SurgeryError(
            f"each level alone lets {_listed(seen)} scores in, all together {together} and not "
            f"{sum(seen)}: {OP_TYPE} has no cut over all levels together"
        )
    return most


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _threshold(candidates: Candidates, most: int) -> float:
    """What a score must exceed to come in, as the shortest decimal fraction that can be it."""
    heads = candidates.heads
    count = min(most, _STEPS, heads.levels[0].priors)
    low, high = -16.0, 8.0
    least, best = 0.0, 1.0
    for _ in range(6):
        steps = np.linspace(low, high, count).astype(np.float32)
        logits = np.full((heads.num_classes, heads.num_priors), -30.0, np.float32)
        logits[0, :count] = steps
        scores = candidates.entering(logits)
        expected = activate(steps.astype(np.float64), sigmoid=True)
        entered = int((scores > expected[0] / 2).sum())
        if entered == count and low == -16.0:
            return 0.0
        if not 0 < entered <= count:
            raise SurgeryError("no candidate comes in, however high its score")
        first = count - entered
        best = min(best, float(scores[entered - 1]))
        least = max(least, float(expected[first - 1])) if first else least
        low, high = float(steps[max(first - 1, 0)]), float(steps[first])
        if np.nextafter(np.float32(low), np.float32(high)) >= np.float32(high):
            break
    return _shortest(least * (1 - 2e-7), best)


def _shortest(least: float, below: float) -> float:
    """The shortest decimal fraction in [least, below)."""
    for digits in range(1, 10):
        for value in (least, below):
            short = float(f"{value:.{digits}g}")
            if least <= short < below:
                return short
    return least


def _by_cell(geometry: Geometry) -> bool:
    """Whether, of equal scores of a class, that of the lower cell comes before the lower anchor."""
    candidates = geometry.candidates
    heads, level = candidates.heads, candidates.heads.levels[0]
    cells = level.height * level.width
    if level.anchors == 1 or cells == 1:
        return False
    pair = np.array([cells - 1, cells])  # the last cell of the first anchor, the first of the next
    logits = np.full((heads.num_classes, heads.num_priors), -30.0, np.float32)
    logits[0, pair] = 4.0
    deltas = np.zeros((4, heads.num_priors), np.float32)
    deltas[2:] = -256.0  # a point
    first = candidates.order(logits, deltas)[0, :2] / geometry.unit
    ltrb = geometry.priors[pair]
    centre = ((ltrb[:, :2] + ltrb[:, 2:]) / 2).clip(0, 1)
    return bool(np.abs(centre - first).sum(axis=1).argmin() == 1)


def _kept(model: onnx.ModelProto, geometry: Geometry, outputs: Sequence[str], most: int) -> int:
    """How many detections of an image are kept, of so many that are all but points apart."""
    heads, rng = geometry.candidates.heads, np.random.default_rng(0)
    logits = np.full((heads.num_classes, heads.num_priors), -30.0, np.float32)
    start, count = 0, 0
    for level in heads.levels:
        some = min(level.priors, most)
        logits[np.arange(some) % heads.num_classes, start + np.arange(some)] = rng.uniform(
            2, 6, some
        )
        start += level.priors
        count += some
    batch = heads.batch or 1
    loc = np.zeros((batch, 4, heads.num_priors), np.float32)
    loc[:, :2] = rng.uniform(-0.3, 0.3, (2, heads.num_priors)) / geometry.variances[:2, None]
    loc[:, 2:] = -12.0 / geometry.variances[2:, None]
    conf = np.broadcast_to(logits, (batch, *logits.shape)).astype(np.float32)
    rows = read_rows(HeadRunner(model, heads, outputs)(*heads.arrange(loc, conf)))
    kept = len(rows[0])
    if not 0 < kept <= 0.9 * count:  # a few may overlap by chance
        raise SurgeryError(
            f"of {count} detections {kept} come out: how many an image keeps is not known; export "
            "with a bound on them that is well below"
        )
    return kept

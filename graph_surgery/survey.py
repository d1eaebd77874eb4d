"""What can be told of any ONNX graph, though the surgery may not understand all of it."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, import_graph
from graph_surgery.heads import Heads, Layout
from graph_surgery.names import NAMES_KEY, names_from_json
from graph_surgery.nms_function import DOMAIN, OP_TYPE, NmsAttributes
from graph_surgery.normalisation import take_out_normalisation
from graph_surgery.pattern import (
    check_classes,
    find_nms_node,
    find_tail,
    pair_heads,
    read_parameters,
    read_surgered,
)
from graph_surgery.probe import FRACTIONS, Decoded, probe_boxes, probe_scores
from graph_surgery.protobuf import inputs, opset_of, type_of
from graph_surgery.sizes import fold_sizes
from graph_surgery.tail import DetectionTail, between, image_size, tail_runner, threshold
from graph_surgery.unfuse import inline_functions, unfuse
from graph_surgery.walk import NMS, RESHAPING, suppressions

T = TypeVar("T")
Facts = dict[str, str]


@dataclass(frozen=True)
class Survey:
    """What was found in a model.

    Attributes
    ----------
    facts
        In the order in which they are shown.
    heads
        Head convolutions, if there are any.
    priors
        float32 [2, P * 4, 1], as `DetectionTail` has them.
    tail
        What lies behind the heads, where all of it is understood.
    surgered
        Whether that is an NMS_OPT_TRT node.
    missing
        What was looked for, the nearest match and the remedy, a line each.
    """

    facts: Facts
    heads: Heads | None = None
    priors: NDArray[np.float32] | None = None
    tail: DetectionTail | None = None
    surgered: bool = False
    missing: tuple[str, ...] = ()


def survey(model: onnx.ModelProto) -> Survey:
    """Look at a valid model, and tell what is known of it and what is missing."""
    facts = _file(model)
    try:
        model = fold_sizes(unfuse(inline_functions(model)))
        graph = import_graph(model)
    except SurgeryError as error:
        return Survey({"kind": "a graph that cannot be read"} | facts, missing=(str(error),))
    if (node := find_nms_node(graph)) is not None:
        return _surgered(model, graph, node, facts)
    facts |= _suppressions(graph)
    try:
        tail = find_tail(graph, model)
    except SurgeryError as error:
        return _in_parts(model, graph, facts, error)
    kind = "a detector that 'graph-surgery nms' takes, if old and new rows prove to be the same"
    known = _understood(tail, {"kind": kind} | facts, surgered=False)
    try:
        take_out_normalisation(model)
    except SurgeryError as error:
        return replace(known, missing=(*known.missing, str(error)))
    return known


def _file(model: onnx.ModelProto) -> Facts:
    kinds = Counter(node.op_type for node in model.graph.node)
    quantised = kinds["QuantizeLinear"] + kinds["DequantizeLinear"]
    facts = {f"input {value.name}": type_of(value) for value in inputs(model)}
    facts |= {f"output {value.name}": type_of(value) for value in model.graph.output}
    facts["nodes"] = f"{len(model.graph.node)}, {kinds['Conv']} Conv, opset {opset_of(model)}"
    if quantised:
        facts["quantised"] = (
            f"yes: {kinds['QuantizeLinear']} QuantizeLinear, {kinds['DequantizeLinear']} "
            "DequantizeLinear"
        )
    entries = {entry.key: entry.value for entry in model.metadata_props}
    with contextlib.suppress(SurgeryError):
        if names := names_from_json(entries.get(NAMES_KEY, "[]")):
            facts["class names"] = f"{len(names)}: {', '.join(names)}"
    return facts


def _surgered(model: onnx.ModelProto, graph: gs.Graph, node: gs.Node, facts: Facts) -> Survey:
    defined = any((one.domain, one.name) == (DOMAIN, OP_TYPE) for one in model.functions)
    kind = f"a detector after its surgery: {OP_TYPE}"
    kind += "" if defined else " without its definition, which only its plugin can run"
    try:
        tail = read_surgered(graph, node)
    except SurgeryError as error:
        why = f"{error}; start again from the model before its surgery"
        return Survey({"kind": kind} | facts, surgered=True, missing=(why,))
    return _understood(tail, {"kind": kind} | facts, surgered=True)


def _understood(tail: DetectionTail, facts: Facts, *, surgered: bool) -> Survey:
    a = tail.attributes
    facts |= _anchors(tail.heads, tail.priors)
    facts |= _boxes(tail.decoded)
    facts |= _scores(tail.heads, a.backgroundLabelId, a.confSigmoid == 1)
    facts |= _levels(a)
    return Survey(facts, tail.heads, tail.priors, tail, surgered)


def _in_parts(model: onnx.ModelProto, graph: gs.Graph, facts: Facts, whole: SurgeryError) -> Survey:
    """What is known of a tail that is not understood as a whole."""
    own = [node for node in suppressions(graph) if any(node is one for one in graph.nodes)]
    nms = own[0] if own else None
    try:
        readings = pair_heads(_ends(graph, nms), describe(nms) if nms else "the outputs")
    except SurgeryError:
        readings = []
    found = [_probed(model, graph, nms, heads) for heads in readings]
    best = min(found, key=lambda one: len(one.missing), default=Survey({}))
    kind = "a detector whose postprocessing is not understood"
    if "suppression" not in facts:
        kind = "a detector without NonMaxSuppression"
        if not best.facts and (best.missing or not best.heads):  # two convolutions prove nothing
            best, kind = Survey({}), "no detector, as far as is seen"
    missing = dict.fromkeys([str(whole), *best.missing])
    return replace(best, facts={"kind": kind} | facts | best.facts, missing=tuple(missing))


def _ends(graph: gs.Graph, nms: gs.Node | None) -> Sequence[gs.Tensor]:
    """Where boxes and scores arrive."""
    return list(nms.inputs[:2] if nms else graph.outputs)


def _probed(
    model: onnx.ModelProto,
    graph: gs.Graph,
    nms: gs.Node | None,
    heads: Heads,
) -> Survey:
    """What each probe of a tail says, though others fail."""
    facts: Facts = {}
    missing: list[str] = []
    joining = RESHAPING | {"Concat"}
    if nms is None and all(node.op in joining for node in between(graph, graph.outputs, heads)):
        return Survey({}, heads)  # the heads are the outputs

    def attempt(probe: Callable[[], T]) -> T | None:
        try:
            return probe()
        except SurgeryError as error:
            missing.append(str(error))
            return None

    run = attempt(lambda: tail_runner(graph, model, _ends(graph, nms), heads))
    if run is None:
        return Survey(facts, heads, missing=tuple(missing))
    priors = None
    layouts = [Layout(*flags) for flags in itertools.product((False, True), repeat=2)]
    if (boxes := attempt(lambda: probe_boxes(run, heads, image_size(model)))) is not None:
        priors, decoded = boxes
        layouts = [decoded.layout]
        facts |= _anchors(heads, priors) | _boxes(decoded)
    errors = len(missing)
    for layout in layouts:
        ordered = replace(heads, layout=layout)
        if (scores := attempt(functools.partial(probe_scores, run, ordered))) is not None:
            del missing[errors:]
            facts |= _scores(heads, *scores)
            break
    del missing[errors + 1 :]
    if nms is not None and nms.op == NMS:
        attempt(lambda: check_classes(nms, heads, run))
        background, sigmoid = scores or (-1, False)
        read = functools.partial(read_parameters, graph, nms, heads, background, sigmoid=sigmoid)
        if (what := attempt(read)) is not None:
            facts |= {"kept": f"{what[0].keepTopK} detections of an image"}
    return Survey(facts, heads, priors, missing=tuple(missing))


def _suppressions(graph: gs.Graph) -> Facts:
    """Every operator that suppresses, with what is known of it."""
    lines = []
    for node in suppressions(graph):
        known = [describe(node)]
        if node.op == NMS:
            known.append(f"IoU above {_number(graph, node, 3)}")
            known.append(f"scores above {_number(graph, node, 4)}")
            known.append(f"at most {_number(graph, node, 2)} of a class")
        lines.append(", ".join(known))
    return {"suppression": "; ".join(lines)} if lines else {}


def _number(graph: gs.Graph, nms: gs.Node, position: int) -> str:
    try:
        return f"{threshold(graph, nms, position):g}"
    except SurgeryError:
        return "what the graph computes"


def _anchors(heads: Heads, priors: NDArray[np.float32]) -> Facts:
    ltrb = priors[0].reshape(-1, 4)
    centre, size = (ltrb[:, :2] + ltrb[:, 2:]) / 2, ltrb[:, 2:] - ltrb[:, :2]
    cells = ", ".join(str(level.anchors) for level in heads.levels)
    return {
        "anchors": f"{heads.num_priors}, {cells} a cell; centres {centre.min():.3g} to "
        f"{centre.max():.3g}, sides {size.min():.3g} to {size.max():.3g} of the image; variances "
        + ", ".join(f"{value:g}" for value in priors[1].reshape(-1, 4)[0])
    }


def _boxes(decoded: Decoded) -> Facts:
    width, height = decoded.unit
    unit = (
        "fractions of the image" if decoded.unit == FRACTIONS else f"pixels of {width} x {height}"
    )
    return {
        "boxes": f"coded as CENTER_SIZE, decoded in {unit} as {decoded.form} in {decoded.name!r}",
        "order": str(decoded.layout),
    }


def _scores(heads: Heads, background: int, sigmoid: bool) -> Facts:
    left_out = "no background" if background < 0 else f"class {background} the background"
    how = "sigmoid of each of" if sigmoid else "softmax over"
    return {"scores": f"{how} {heads.num_classes} classes, {left_out}"}


def _levels(attributes: NmsAttributes) -> Facts:
    a = attributes
    if a.version == 1:
        return {}
    clip = "clipped to the image before suppression" if a.clipBeforeNms else "not clipped before it"
    bound = f"dw and dh bounded by {a.bboxXformClip:.6g}" if a.bboxXformClip else "dw, dh unbounded"
    cut = f"the {a.levelTopK} best of each level enter suppression" if a.levelTopK else "no cut"
    return {"version 2": f"{cut}; boxes {clip}; {bound}"}

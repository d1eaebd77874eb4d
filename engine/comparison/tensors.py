"""Which tensors two sides of a comparison show, and where a plan's ONNX file is."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import onnx

from engine.errors import EngineError
from engine.manifest import Manifest
from engine.model import Detector, load_detector
from engine.support.external import model_sha256
from graph_surgery.errors import SurgeryError
from graph_surgery.heads import OPERATOR
from graph_surgery.inspect import read_tail
from graph_surgery.protobuf import types

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def head_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Find the outputs of the head convolutions of a detector, before or after the surgery.

    Returns
    -------
    dict
        ``loc_0``…, ``conf_0``…, levels in the order of the priors, to the tensor's name.

    Raises
    ------
    SurgeryError
        When there is no detection tail that the surgery understands, or its heads have another
        order of channels than after a surgery: they are not to be held against others.
    """
    heads = read_tail(model)[0].heads
    if heads.layout != OPERATOR:
        raise SurgeryError(f"the heads are not in the operator's order: {heads.layout}")
    levels = heads.levels
    loc = {f"loc_{index}": level.loc for index, level in enumerate(levels)}
    return loc | {f"conf_{index}": level.conf for index, level in enumerate(levels)}


def is_head(role: str) -> bool:
    """Tell a role of `head_tensors` from a tensor's name."""
    return re.fullmatch(r"(loc|conf)_\d+", role) is not None


def layer_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Find the float tensors between image and heads that layers compute, heads left out.

    What a DequantizeLinear gives is left out as well: an engine reads it in INT8.

    Returns
    -------
    dict
        Name to name, in the order of the graph.

    Raises
    ------
    SurgeryError
        See `head_tensors`.
    """
    heads = set(head_tensors(model).values())
    wanted, found = set(heads), []
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in reversed(model.graph.node):  # in topological order
        if wanted.isdisjoint(node.output):
            continue
        wanted.update(node.input)
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant"):
            found += [name for name in reversed(node.output) if name in wanted]
    kinds = {name: known.type.tensor_type.elem_type for name, known in types(model).items()}
    return {
        name: name
        for name in reversed(found)
        if name not in heads and name not in constants and kinds.get(name) in _FLOATS
    }


def find_source(engine: Path, manifest: Manifest, given: Path | None) -> Detector | None:
    """Find the ONNX file that an engine was built from, by its hash.

    Parameters
    ----------
    engine
        The engine's file.
    manifest
        Its manifest.
    given
        The file, if the user named it. None: it is looked for beside the engine, and in the folder
        ``onnx`` beside that one.

    Returns
    -------
    Detector
        None when it was not found.

    Raises
    ------
    EngineError
        When the given one is another.
    """
    if given is not None:
        detector = load_detector(given)
        if detector.sha256 != manifest.onnx_sha256:
            raise EngineError(f"{given}: {engine} was built from another file, {manifest.model}")
        return detector
    folder = engine.resolve().parent
    folders = (engine.parent, folder.parent / "onnx")
    paths = [path for folder in folders for path in sorted(folder.glob("*.onnx")) if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name != manifest.model):
        with contextlib.suppress(FileNotFoundError):  # of another model's data
            if model_sha256(path) == manifest.onnx_sha256:
                return load_detector(path)
    return None


def shown(detector: Detector | None, *, layers: bool = False) -> dict[str, str]:
    """Tensors that a comparison shows of a detector, by role; none where they are not known."""
    if detector is None:
        return {}
    try:
        heads = head_tensors(detector.model)
        return (layer_tensors(detector.model) if layers else {}) | heads
    except SurgeryError:  # a tail that the surgery does not understand
        return {}

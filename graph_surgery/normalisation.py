"""Images that a graph normalises itself, as torchvision's detectors do.

All engines here take images that are normalised already, so such a graph would do it a second time:
what it does to pixels before anything else is read as a map of each channel, and taken out where it
is the one that is done before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.graph import describe, export_graph, import_graph, value
from graph_surgery.heads import SHAPE_ONLY
from graph_surgery.network import bypass

MEAN = (0.485, 0.456, 0.406)
"""RGB mean of ImageNet, for values in 0..1 (MLPerf reference dataset.py, torchvision)."""
STD = (0.229, 0.224, 0.225)
"""RGB standard deviation that goes with `MEAN`."""

TOLERANCE = 1e-4
"""Largest relative difference of a mean or deviation; they are published with three digits."""

_ARITHMETIC = frozenset({"Sub", "Div", "Mul", "Add"})
_MOVING = frozenset({"Cast", "Clip", "Concat", "Gather", "Identity", "Pad", "Reshape", "Resize"})
_MOVING |= {"Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Upsample"}
"""Operators through which an image is followed; behind some, its channels are not known."""

Channels = NDArray[np.float64]
Step = tuple[gs.Node, int]
"""A node, and which of its inputs the image is."""


@dataclass(frozen=True)
class Normalisation:
    """What a graph did to its images: scale * x + shift.

    Attributes
    ----------
    image
        Name of the input.
    scale, shift
        float64 [3], of each channel.
    top
        Largest pixel: 1 or 255.
    """

    image: str
    scale: Channels
    shift: Channels
    top: int


@dataclass(frozen=True)
class _Pixels:
    """A tensor that is scale * x + shift of the image, and which of its axes are the channels."""

    scale: Channels
    shift: Channels
    rank: int = 4
    axis: int = 1

    def __add__(self, shift: Channels) -> _Pixels:
        return replace(self, shift=self.shift + shift)

    def __mul__(self, scale: Channels) -> _Pixels:
        return replace(self, scale=self.scale * scale, shift=self.shift * scale)


@dataclass(frozen=True)
class _Way:
    """From the image to the network: nodes that compute, maps where they end, what is not known."""

    steps: list[Step]
    ends: list[_Pixels]
    unknown: list[gs.Node]


def take_out_normalisation(
    model: onnx.ModelProto,
) -> tuple[onnx.ModelProto, Normalisation | None]:
    """Let a model take normalised images, if it normalises them itself.

    Parameters
    ----------
    model
        Its images are [N, 3, H, W]. It is not changed.

    Returns
    -------
    A model without it, and what it was; the one given and None where there is none.

    Raises
    ------
    SurgeryError
        When the graph normalises by other numbers, or computes something else with its images.
    """
    graph = import_graph(model)
    if (found := _find(graph)) is None:
        return model, None
    normalisation, steps = found
    for node, place in steps:
        bypass(graph, node, node.inputs[place])
    return export_graph(graph.cleanup(recurse_functions=False), model), normalisation


def check_normalised(graph: gs.Graph) -> None:
    """Raise SurgeryError when a graph does not take its images as they are."""
    if (found := _find(graph)) is not None:
        raise SurgeryError(
            f"the graph normalises its images {found[0].image!r} itself, and they are normalised "
            "before"
        )


def _find(graph: gs.Graph) -> tuple[Normalisation, list[Step]] | None:
    """Find the normalisation of a graph, and its nodes in their order."""
    if (image := _image(graph)) is None:
        return None
    way = _follow(graph, image)
    found = _read(image, way)
    return None if found is None else (found, way.steps)


def _image(graph: gs.Graph) -> gs.Variable | None:
    """The one input that is float [N, 3, H, W]."""
    found: list[gs.Variable] = []
    for given in graph.inputs:
        is_float = isinstance(given.dtype, np.dtype) and given.dtype.kind == "f"
        if is_float and len(given.shape or []) == 4 and given.shape[1] == 3:
            found.append(given)
    return found[0] if len(found) == 1 else None


def _follow(graph: gs.Graph, image: gs.Variable) -> _Way:
    """Follow an image until something is done to it that is no map of each channel."""
    way, seen = _Way([], [], []), set()
    stack: list[tuple[gs.Tensor, _Pixels | None]] = [(image, _Pixels(np.ones(3), np.zeros(3)))]
    while stack:
        tensor, pixels = stack.pop()
        ends = any(output is tensor for output in graph.outputs)
        for node in tensor.outputs:
            if node.op in SHAPE_ONLY:
                continue
            made, place = None, next(i for i, one in enumerate(node.inputs) if one is tensor)
            constant = value(graph, node.inputs[1 - place]) if node.op in _ARITHMETIC else None
            if pixels and constant is not None:
                made = _computed(node.op, place, pixels, constant)
            elif pixels and node.op in _MOVING:
                made = _moved(graph, node, pixels)
            ends |= made is None
            if id(node) in seen:
                continue
            seen.add(id(node))
            if constant is not None and made:
                way.steps.append((node, place))
            elif constant is not None:
                way.unknown.append(node)
            if made or node.op in _MOVING:
                stack.extend((output, made) for output in node.outputs)
        if ends and pixels:
            way.ends.append(pixels)
    return way


def _computed(
    operator: str, place: int, pixels: _Pixels, constant: NDArray[np.generic]
) -> _Pixels | None:
    """What elementwise arithmetic with a constant of one value, or one a channel, makes."""
    shape = [1] * (pixels.rank - constant.ndim) + list(constant.shape)
    others = shape[: pixels.axis] + shape[pixels.axis + 1 :]
    if len(shape) != pixels.rank or set(others) - {1} or shape[pixels.axis] not in (1, 3):
        return None
    number = np.broadcast_to(constant.astype(np.float64).reshape(-1), 3)
    if operator == "Add":
        made = pixels + number
    elif operator == "Mul":
        made = pixels * number
    elif operator == "Sub":
        made = pixels + -number if place == 0 else pixels * -np.ones(3) + number
    elif place == 0 and number.all():
        made = pixels * (1 / number)
    else:
        return None
    return made if made.scale.all() and np.isfinite([made.scale, made.shift]).all() else None


def _moved(graph: gs.Graph, node: gs.Node, pixels: _Pixels) -> _Pixels | None:
    """What an operator makes that moves pixels, or mixes those of a channel by weights of sum 1.

    None: it changes more, or where the channels are is not known.
    """
    rank, axis = pixels.rank, pixels.axis
    made = None
    if node.op in ("Identity", "Resize", "Upsample"):
        made = pixels
    elif node.op == "Cast":
        made = pixels if node.outputs[0].dtype in (np.float16, np.float32, np.float64) else None
    elif node.op == "Transpose":
        perm = node.attrs.get("perm", list(range(rank))[::-1])
        made = replace(pixels, axis=list(perm).index(axis))
    elif node.op == "Reshape":
        before, after = node.inputs[0].shape, node.outputs[0].shape
        made = pixels if before and list(before) == list(after or []) else None
    elif node.op == "Pad":  # what it adds is not normalised
        pads = _numbers(graph, node, 1, "pads")
        made = pixels if pads is not None and not any(pads) else None
    elif node.op == "Concat":
        made = pixels if len(node.inputs) == 1 else None
    elif node.op == "Split":
        made = pixels if node.attrs.get("axis", 0) % rank != axis else None
    elif node.op == "Slice":
        axes = _numbers(graph, node, 3, "axes")
        made = pixels if axes is not None and axis not in [one % rank for one in axes] else None
    elif node.op == "Gather" and (index := value(graph, node.inputs[1])) is not None:
        if node.attrs.get("axis", 0) % rank < axis:
            more = index.ndim - 1
            made = replace(pixels, rank=rank + more, axis=axis + more)
    elif node.op in ("Squeeze", "Unsqueeze"):
        axes = _numbers(graph, node, 1, "axes") or []
        more = len(axes) if node.op == "Unsqueeze" else -len(axes)
        whole = max(rank, rank + more)  # the rank in which the axes are counted
        if axes and all(one % whole < max(axis, axis + more) for one in axes):
            made = replace(pixels, rank=rank + more, axis=axis + more)
    return made


def _numbers(graph: gs.Graph, node: gs.Node, index: int, attribute: str) -> list[int] | None:
    """Constant integers that newer opsets have as an input, older ones as an attribute."""
    if len(node.inputs) <= index:
        found = node.attrs.get(attribute)
        return None if found is None else list(found)
    values = value(graph, node.inputs[index])
    return None if values is None else [int(one) for one in values.reshape(-1)]


def _read(image: gs.Variable, way: _Way) -> Normalisation | None:
    """Tell what is done to an image; None: nothing.

    Raises
    ------
    SurgeryError
        When it is not what is done to images before.
    """
    ours = f"this project's preprocessing normalises by ImageNet's mean {MEAN} and deviation {STD}"
    if way.unknown:
        raise SurgeryError(
            f"the graph computes with its images {image.name!r} ({describe(way.unknown[0])}), and "
            f"not a normalisation that is known; {ours}: export without it"
        )
    numbers = [np.stack([one.scale, one.shift]) for one in way.ends]
    if all(np.allclose(one, [[1], [0]], TOLERANCE, TOLERANCE) for one in numbers):
        return None
    if not all(np.allclose(one, numbers[0], TOLERANCE) for one in numbers):
        raise SurgeryError(
            f"the graph normalises its images {image.name!r} itself, but not for all that read "
            f"them; {ours}: export without it"
        )
    scale, shift = numbers[0]
    mean, deviation = -shift / scale, 1 / scale
    for top in (1, 255):
        expected = np.multiply([MEAN, STD], top)
        if np.allclose([mean, deviation], expected, rtol=TOLERANCE, atol=0):
            return Normalisation(image.name, scale, shift, top)
    found = " and deviation ".join(
        "(" + ", ".join(f"{one:.6g}" for one in part + 0.0) + ")" for part in (mean, deviation)
    )
    raise SurgeryError(
        f"the graph normalises its images {image.name!r} itself, by mean {found}, and {ours}, RGB, "
        "of pixels in 0..1: export without it a detector that was trained with ImageNet's"
    )

"""The head convolutions of a detector, and running what lies behind them on tensors of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.protobuf import Arrays, Runner, part, reads, types

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]

SHAPE_ONLY = frozenset({"Shape", "Size"})
"""Operators that read no value: what they read is shape arithmetic, not data flow."""


@dataclass(frozen=True)
class Level:
    """One feature map: its two head tensors.

    Attributes
    ----------
    loc, conf
        Names of [N, anchors * 4, height, width] and [N, anchors * C, height, width].
    anchors
        Priors per cell.
    height, width
        The grid, in cells.
    """

    loc: str
    conf: str
    anchors: int
    height: int
    width: int

    @property
    def priors(self) -> int:
        """Priors of the level."""
        return self.anchors * self.height * self.width


@dataclass(frozen=True)
class Layout:
    """The order in which a graph has channels and priors.

    Attributes
    ----------
    by_anchor
        Channels of a head are [A, 4] and [A, C]; the operator's are [4, A] and [C, A].
    by_cell
        Priors of a level are [h, w, A]; the operator's are [A, h, w].
    yx
        Deltas are dy, dx, dh, dw; the operator's are dx, dy, dw, dh.
    """

    by_anchor: bool = False
    by_cell: bool = False
    yx: bool = False

    def __str__(self) -> str:
        """In words."""
        channels = "[anchors * 4]" if self.by_anchor else "[4 * anchors]"
        priors = "cell by cell" if self.by_cell else "anchor by anchor"
        deltas = "dy, dx, dh, dw" if self.yx else "dx, dy, dw, dh"
        return f"channels {channels} of {deltas}, priors {priors}"


OPERATOR = Layout()
"""The order of NMS_OPT_TRT."""


@dataclass(frozen=True)
class Heads:
    """All head tensors of a detector.

    Attributes
    ----------
    levels
        In the order of the priors.
    num_classes
        C, with background.
    batch
        Fixed batch size, None when it is dynamic.
    layout
        Order of channels and priors.
    """

    levels: tuple[Level, ...]
    num_classes: int
    batch: int | None
    layout: Layout = OPERATOR

    @property
    def names(self) -> list[str]:
        """Loc of every level, conf of every level."""
        return [*(level.loc for level in self.levels), *(level.conf for level in self.levels)]

    @property
    def num_priors(self) -> int:
        """P, over all levels."""
        return sum(level.priors for level in self.levels)

    @property
    def channels(self) -> dict[str, Ints]:
        """By head tensor: which of its channels the operator's first, second, ... is."""
        found = {}
        for level in self.levels:
            for name, rows in ((level.loc, 4), (level.conf, self.num_classes)):
                count = rows * level.anchors
                planes = np.arange(count).reshape(rows, level.anchors)
                if self.layout.by_anchor:
                    planes = np.arange(count).reshape(level.anchors, rows).T
                if self.layout.yx and name == level.loc:
                    planes = planes[[1, 0, 3, 2]]
                found[name] = planes.reshape(-1)
        return found

    @property
    def order(self) -> Ints:
        """[P]: which of the graph's priors the operator's first, second, ... is."""
        parts, start = [], 0
        for level in self.levels:
            places = np.arange(start, start + level.priors)
            parts.append(places.reshape(-1, level.anchors).T if self.layout.by_cell else places)
            start += level.priors
        return np.concatenate([part.reshape(-1) for part in parts])

    def arrange(self, loc: Floats, conf: Floats) -> tuple[Floats, Floats]:
        """Deltas [N, 4, P] and logits [N, C, P] of the operator as the graph has their channels."""
        ends, channels = np.cumsum([level.priors for level in self.levels])[:-1], self.channels
        parts = [*np.split(loc, ends, axis=2), *np.split(conf, ends, axis=2)]
        for index, name in enumerate(self.names):
            places = np.argsort(channels[name])
            planes = parts[index].reshape(len(loc), len(places), -1)
            parts[index] = planes[:, places].reshape(parts[index].shape)
        count = len(self.levels)
        return np.concatenate(parts[:count], axis=2), np.concatenate(parts[count:], axis=2)


class HeadRunner:
    """Everything from the head tensors to some tensors behind them, in ONNX Runtime.

    Parameters
    ----------
    outputs
        Tensors to compute.

    Raises
    ------
    SurgeryError
        When the outputs depend on more than the heads, or ONNX Runtime rejects the part.
    """

    def __init__(self, model: onnx.ModelProto, heads: Heads, outputs: Sequence[str]) -> None:
        self.heads = heads
        known = types(model)
        behind, sources = set(heads.names), []
        given = [onnx.ValueInfoProto(name=name) for name in heads.names]
        for node in part(model, given, outputs).graph.node:
            if behind.intersection(reads(node)):
                behind.update(node.output)
            elif node.op_type in SHAPE_ONLY:
                sources.append(node.input[0])
        constants = {tensor.name for tensor in model.graph.initializer}
        constants.update(n.output[0] for n in model.graph.node if n.op_type == "Constant")
        names = [name for name in dict.fromkeys(sources) if name not in constants]
        self.inputs = []
        for name in [*heads.names, *names]:
            if name not in known:
                raise SurgeryError(f"the type of tensor {name!r} is not known")
            self.inputs.append(known[name])
        cut = part(model, self.inputs, outputs)
        made = {value.name for value in self.inputs}.union(constants)
        for node in cut.graph.node:
            for name in reads(node):
                if name not in made:
                    raise SurgeryError(
                        f"{node.op_type} {node.name!r} behind the heads also reads {name!r}, which "
                        "does not come from them"
                    )
            made.update(node.output)
        self.run = Runner(cut)

    def __call__(self, loc: Floats, conf: Floats) -> Arrays:
        """Run on deltas [N, 4, P] and logits [N, C, P], split and reshaped, not reordered.

        Tensors of which only the shape is read are zeros.
        """
        levels, batch = self.heads.levels, len(loc)
        ends = np.cumsum([level.priors for level in levels])[:-1]
        parts = [*np.split(loc, ends, axis=2), *np.split(conf, ends, axis=2)]
        feeds = {}
        for index, value in enumerate(self.inputs):
            tensor = value.type.tensor_type
            full = [batch, *(size.dim_value or 1 for size in tensor.shape.dim[1:])]
            values = parts[index] if index < len(parts) else np.zeros(full)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            feeds[value.name] = values.reshape(full).astype(dtype)
        return self.run(feeds)

    def given(self, values: Floats) -> Floats:
        """Values as the heads hold them, which may be of float16."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.inputs[0].type.tensor_type.elem_type)
        return values.astype(dtype).astype(np.float32)

"""The head convolutions of a detector, and running what lies behind them on tensors of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.topology import Arrays, Runner, Topology, data_inputs

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
    """

    levels: tuple[Level, ...]
    num_classes: int
    batch: int | None

    @property
    def names(self) -> list[str]:
        """Loc of every level, conf of every level."""
        return [*(level.loc for level in self.levels), *(level.conf for level in self.levels)]

    @property
    def num_priors(self) -> int:
        """P, over all levels."""
        return sum(level.priors for level in self.levels)


def read_heads(topology: Topology, loc: Sequence[str], conf: Sequence[str]) -> Heads:
    """Pair the head tensors of each level.

    Raises
    ------
    SurgeryError
        When shapes are not static, differ within a pair, or give no common number of classes.
    """
    levels: list[Level] = []
    classes: set[int] = set()
    batches: set[int | None] = set()
    for loc_name, conf_name in zip(loc, conf, strict=True):
        loc_shape, conf_shape = topology.shape(loc_name), topology.shape(conf_name)
        for name, shape in ((loc_name, loc_shape), (conf_name, conf_shape)):
            if len(shape) != 4 or None in shape[1:]:
                raise SurgeryError(
                    f"head tensor {name!r} has shape {shape}, needed is [N, C, h, w] with static "
                    "C, h and w: export with a fixed image size"
                )
        channels, height, width = (size or 0 for size in loc_shape[1:])
        conf_channels = conf_shape[1] or 0
        if loc_shape[2:] != conf_shape[2:] or channels % 4 or conf_channels % (channels // 4):
            raise SurgeryError(
                f"head tensors {loc_name!r} {loc_shape} and {conf_name!r} {conf_shape} are no pair "
                "of [N, A * 4, h, w] and [N, A * C, h, w]"
            )
        anchors = channels // 4
        levels.append(Level(loc_name, conf_name, anchors, height, width))
        classes.add(conf_channels // anchors)
        batches.update((loc_shape[0], conf_shape[0]))
    if len(classes) != 1:
        raise SurgeryError(f"the levels differ in their number of classes: {sorted(classes)}")
    batch = batches.pop() if len(batches) == 1 else None
    return Heads(tuple(levels), classes.pop(), batch)


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

    def __init__(self, topology: Topology, heads: Heads, outputs: Sequence[str]) -> None:
        self.heads = heads
        behind, sources = set(heads.names), []
        for index in topology.upstream(outputs, heads.names):
            node = topology.nodes[index]
            if behind.intersection(node.input):
                behind.update(node.output)
            elif node.op_type in SHAPE_ONLY and node.input[0] not in topology.constants:
                sources.append(node.input[0])
        self.inputs = list(dict.fromkeys([*heads.names, *sources]))
        part = topology.part(self.inputs, outputs)
        known = {tensor.name for tensor in part.graph.initializer}.union(self.inputs)
        for node in part.graph.node:
            for name in data_inputs(node):
                if name not in known:
                    raise SurgeryError(
                        f"{node.op_type} {node.name!r} behind the heads also reads {name!r}, which "
                        "does not come from them"
                    )
            known.update(node.output)
        self.types = [(topology.shape(name), topology.dtype(name)) for name in self.inputs]
        self.run = Runner(part)

    def __call__(self, loc: NDArray[np.float32], conf: NDArray[np.float32]) -> Arrays:
        """Run on deltas [N, 4, P] and logits [N, C, P].

        Tensors of which only the shape is read are zeros.
        """
        levels, batch = self.heads.levels, len(loc)
        ends = np.cumsum([level.priors for level in levels])[:-1]
        parts = [*np.split(loc, ends, axis=2), *np.split(conf, ends, axis=2)]
        feeds = {}
        for index, (name, (shape, dtype)) in enumerate(zip(self.inputs, self.types, strict=True)):
            full = [batch, *(size or 1 for size in shape[1:])]
            values = parts[index] if index < len(parts) else np.zeros(full)
            feeds[name] = values.reshape(full).astype(dtype)
        return self.run(feeds)

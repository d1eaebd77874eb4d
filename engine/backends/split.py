"""A detector cut before its NMS_OPT_TRT node: the ONNX that remains, the node for libnms_opt.so."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graph_surgery.errors import SurgeryError
from graph_surgery.heads import Heads
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.pattern import find_nms_node, read_surgered
from graph_surgery.topology import Topology
from plugin_cuda.errors import PluginError
from plugin_cuda.library import (
    FLOAT16,
    FLOAT32,
    Config,
    Format,
    Level,
    load_library,
    workspace_size,
)

_DTYPES = {np.dtype(np.float32): FLOAT32, np.dtype(np.float16): FLOAT16}


class UnsplitError(Exception):
    """Why NMS_OPT_TRT cannot be libnms_opt.so, and what to do. One line."""


@dataclass(frozen=True)
class Split:
    """A detector cut before its NMS_OPT_TRT node.

    Attributes
    ----------
    network
        The model from the image to the head tensors; no function, no priors.
    heads
        Its outputs by name: their shape for one image and their type; loc of every level, conf of
        every level.
    priors
        float32 [2, P * 4, 1], as NMS_OPT_TRT takes them.
    config
        The node's attributes.
    library
        What runs it.
    """

    network: onnx.ModelProto
    heads: Mapping[str, tuple[tuple[int, int, int], np.dtype[Any]]]
    priors: NDArray[np.float32]
    config: Config
    library: ctypes.CDLL


def split(model: onnx.ModelProto) -> Split:
    """Cut a detector before its NMS_OPT_TRT node.

    Raises
    ------
    UnsplitError
        When the graph does not end in such a node, or libnms_opt.so is missing or refuses it.
    """
    node = find_nms_node(model)
    if node is None:
        raise UnsplitError(f"the graph has no {OP_TYPE} node; run 'graph-surgery nms' on it")
    outputs = [output.name for output in model.graph.output]
    if outputs != ["detections", "num_detections"] or list(node.output) != outputs:
        raise UnsplitError(
            f"the graph does not end in {OP_TYPE}: its outputs are {', '.join(outputs)}"
        )
    try:
        topology = Topology(model)
        tail = read_surgered(topology, node)
        constants = {tensor.name for tensor in model.graph.initializer}
        inputs = [value.name for value in model.graph.input if value.name not in constants]
        network = topology.part(inputs, tail.heads.names)
    except SurgeryError as error:
        raise UnsplitError(str(error)) from error
    network.metadata_props.extend(model.metadata_props)
    heads = _heads(topology, tail.heads)
    formats = [Format(_DTYPES[dtype]) for _, dtype in heads.values()]
    levels = tail.heads.levels
    attributes = tail.attributes
    config = Config(
        num_classes=attributes.numClasses,
        background_class=attributes.backgroundLabelId,
        top_k=attributes.topK,
        keep_top_k=attributes.keepTopK,
        confidence_threshold=attributes.confidenceThreshold,
        nms_threshold=attributes.nmsThreshold,
        levels=tuple(
            Level(level.height, level.width, level.anchors, *pair)
            for level, *pair in zip(
                levels, formats[: len(levels)], formats[len(levels) :], strict=True
            )
        ),
        sigmoid=attributes.confSigmoid,
    )
    try:
        library = load_library()
        workspace_size(config, 1, library)  # refuses what cannot be run
    except PluginError as error:
        raise UnsplitError(str(error)) from error
    return Split(network, heads, np.ascontiguousarray(tail.priors), config, library)


def _heads(
    topology: Topology, heads: Heads
) -> dict[str, tuple[tuple[int, int, int], np.dtype[Any]]]:
    """Shape of one image and type of every head tensor."""
    found = {}
    for name in heads.names:
        _, channels, height, width = (size or 0 for size in topology.shape(name))
        found[name] = ((channels, height, width), topology.dtype(name))
        if found[name][1] not in _DTYPES:
            raise UnsplitError(f"head tensor {name!r} is {found[name][1]}, not float32 or float16")
    return found

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
from graph_surgery.graph import export_graph, import_graph, output_names, type_of
from graph_surgery.nms_function import DOMAIN, OP_TYPE, OUTPUTS
from graph_surgery.pattern import find_nms_node, read_surgered
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
    try:
        graph = import_graph(model)
        node = find_nms_node(graph)
        if node is None:
            raise UnsplitError(f"the graph has no {OP_TYPE} node; run 'graph-surgery nms' on it")
        outputs = [tensor.name for tensor in graph.outputs]
        if outputs != [*OUTPUTS] or output_names(node) != outputs:
            raise UnsplitError(
                f"the graph does not end in {OP_TYPE}: its outputs are {', '.join(outputs)}"
            )
        tail = read_surgered(graph, node)
        graph.outputs = node.inputs[:-1]
        graph.functions = [f for f in graph.functions if (f.domain, f.name) != (DOMAIN, OP_TYPE)]
        graph.cleanup(recurse_functions=False)
        heads = {one.name: (tuple(one.shape[1:]), type_of(one)) for one in graph.outputs}
        network = export_graph(graph, model)
    except SurgeryError as error:
        raise UnsplitError(str(error)) from error
    for name, (_, dtype) in heads.items():
        if dtype not in _DTYPES:
            raise UnsplitError(f"head tensor {name!r} is {dtype}, not float32 or float16")
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
        level_top_k=attributes.levelTopK,
        clip_before_nms=attributes.clipBeforeNms,
        bbox_xform_clip=attributes.bboxXformClip,
    )
    try:
        library = load_library()
        workspace_size(config, 1, library)  # refuses what cannot be run
    except PluginError as error:
        raise UnsplitError(str(error)) from error
    return Split(network, heads, np.ascontiguousarray(tail.priors), config, library)

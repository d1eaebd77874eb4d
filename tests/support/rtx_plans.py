"""Plans of TensorRT-RTX, and the nodes that they come from."""

import re
import struct
from importlib.util import find_spec

import numpy as np
import onnx
import pytest

from plugin_cuda.library import Config, Format, Level, workspace_size
from tests.support.graphs import nms_node
from tests.support.plugin_driver import FLOAT32, INT32

NEEDS_RTX = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None or find_spec("polygraphy") is None,
    reason="needs TensorRT-RTX: pip install 'ssd-resnet34-trt[rtx]'",
)
TARGETS = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities to build for."""


def check_plan(plan, model, max_batch, kernels):
    """The node's attributes, the profile and the workspace are in the plan.

    Where TensorRT-RTX 1.7.1 writes them: a field is the length of its name, the name, its type, the
    number of its values, the values; the rest is in the text of its program.
    """
    node = nms_node(onnx.load(model))
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    version = int(values.pop("plugin_version"))
    del values["plugin_namespace"]
    assert len(values) == {1: 14, 2: 17}[version]
    for name, value in values.items():
        kind, numbers = FLOAT32 if isinstance(value, float) else INT32, np.atleast_1d(value)
        data = numbers.astype(np.float32 if kind == FLOAT32 else np.int32).tobytes()
        head = struct.pack("<i", len(name) + 1) + name.encode() + b"\0"
        assert head + struct.pack("<ii", kind, len(numbers)) + data in plan, name
    assert f"shape input value at index 0 is out of bounds [1, {max_batch}]".encode() in plan
    (size,) = re.findall(rb'dims=\{ (\d+) \} mem_prop=0 name="NMS_OPT_TRT_wksp', plan)
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in onnx.load(model).graph.value_info
    }
    levels = []
    for name in node.input[: values["numLayers"]]:
        _, channels, height, width = (dim.dim_value for dim in shapes[name])
        levels.append(Level(height, width, channels // 4, Format(0), Format(0)))
    config = Config(
        num_classes=values["numClasses"],
        background_class=values["backgroundLabelId"],
        top_k=values["topK"],
        keep_top_k=values["keepTopK"],
        confidence_threshold=values["confidenceThreshold"],
        nms_threshold=values["nmsThreshold"],
        levels=tuple(levels),
        level_top_k=values.get("levelTopK", 0),
    )
    assert int(size) == workspace_size(config, max_batch, kernels)


def edited(model, path, **attributes):
    """Write a copy whose NMS_OPT_TRT node has other attributes; return its path."""
    copy = onnx.load(model)
    node = nms_node(copy)
    kept = [a for a in node.attribute if a.name not in attributes]
    node.ClearField("attribute")
    node.attribute.extend(kept)
    node.attribute.extend(onnx.helper.make_attribute(*item) for item in attributes.items())
    onnx.save(copy, path)
    return path

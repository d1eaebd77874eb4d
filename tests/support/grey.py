"""Grey images, the detector that tells how grey they are, and the command that runs it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.support import attempt

GREYS = [10, 40, 20, 50, 30, 60]  # image i is grey; its one object has label grey / 10
BOX = [0.25, 0.125, 0.75, 0.5]  # ymin, xmin, ymax, xmax of every object
CATEGORY_IDS = [1, 2, 4, 8, 16, 90]
FP32 = TensorProto.FLOAT


def grey_detector(path):
    """ONNX: one detection at BOX, its label the grey value / 10, found again from channel 0."""
    mean, std = 0.485, 0.229  # ImageNet's, of the red channel
    constants = {
        "axes": np.array([1, 2]),
        "zero": np.array(0),
        "last": np.array([-1]),
        "gain": np.array(std * 255 / 10, np.float32),
        "offset": np.array(mean * 255 / 10, np.float32),
        "fields": np.array([[0, *BOX, 0.9]], np.float32),
        "six": np.array([6]),
    }
    nodes = [
        helper.make_node("Gather", ["image", "zero"], ["red"], axis=1),
        helper.make_node("ReduceMean", ["red", "axes"], ["level"], keepdims=0),
        helper.make_node("Mul", ["level", "gain"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["value"]),
        helper.make_node("Round", ["value"], ["label"]),
        helper.make_node("Unsqueeze", ["label", "last"], ["column"]),
        helper.make_node("Shape", ["label"], ["batch"]),
        helper.make_node("Concat", ["batch", "six"], ["wide"], axis=0),
        helper.make_node("Expand", ["fields", "wide"], ["boxes"]),
        helper.make_node("Concat", ["boxes", "column"], ["row"], axis=1),
        helper.make_node("Unsqueeze", ["row", "one"], ["detections"]),
        helper.make_node(
            "ConstantOfShape",
            ["batch"],
            ["num_detections"],
            value=helper.make_tensor("v", TensorProto.INT32, [1], [1]),
        ),
    ]
    constants["one"] = np.array([1])
    graph = helper.make_graph(
        nodes,
        "grey",
        [helper.make_tensor_value_info("image", FP32, ["batch", 3, 8, 8])],
        [
            helper.make_tensor_value_info("detections", FP32, ["batch", 1, 7]),
            helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["batch"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


def harness(place, *arguments, **more):
    """The command that users call, in a folder of its own; it never shows a traceback."""
    environment = {"COLUMNS": "200", "BUILD_DIR": "build", **more}
    done = attempt("-m", "harness", *arguments, cwd=place, **environment)
    assert "Traceback" not in done.stderr
    return done

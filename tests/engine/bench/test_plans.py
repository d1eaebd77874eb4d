"""How the layers of two engines are laid side by side."""

from __future__ import annotations

import pytest

from engine.backends.tensorrt.layers import PlanLayer
from engine.bench.cudnn import LayerTime
from engine.bench.plans import LayerPair, side_by_side


def own(name, ms, floor=0.5):
    return LayerTime(name, "a kernel", ms, 1.0, floor, ms / floor)


def layer(name, ms, kind="CaskConvolution"):
    return PlanLayer(name, kind, "", "", "", ms)


def test_layers_are_paired_by_the_nodes_in_them() -> None:
    steps = [
        own("node_conv2d, node_max_pool2d", 1.0),
        own("node_conv2d_1", 2.0),
        own("layer/conv2d_9 + layer/conv2d_15", 3.0),
        own("NMS_OPT_TRT", 4.0),
    ]
    plan = [
        layer("node_conv2d + node_relu", 0.25),
        layer("node_max_pool2d", 0.5, "CaskPooling"),
        layer("Reformatting CopyNode for Input Tensor 0 to node_conv2d_1 + node_add", 0.125),
        layer("node_conv2d_1 + node_add + node_relu_2", 1.0),
        layer("layer/conv2d_9", 2.0),
        layer("layer/conv2d_15", 4.0),
        layer("node_conv2d_10", 8.0),
        layer("nms", 16.0, "PluginV3"),
    ]
    assert side_by_side(steps, plan) == [
        LayerPair("node_conv2d, node_max_pool2d", 1.0, 0.75, 0.5),
        LayerPair("node_conv2d_1", 2.0, 1.125, 0.5),
        LayerPair("layer/conv2d_9 + layer/conv2d_15", 3.0, 6.0, 0.5),
        LayerPair("NMS_OPT_TRT", 4.0, 16.0, 0.5),
        LayerPair("the rest", 0.0, 8.0, None),
    ]


def test_no_time_of_a_plan_is_lost() -> None:
    steps = [own("a", 1.0), own("b + c", 1.0), own("NMS_OPT_TRT", 1.0)]
    plan = [layer(name, 1.0) for name in ("a", "c + b", "d", "x + c", "", "aa")]
    pairs = side_by_side(steps, plan)
    assert sum(pair.tensorrt_ms for pair in pairs) == pytest.approx(len(plan))
    assert pairs[-1].tensorrt_ms == 3.0  # d, the one without a name, aa

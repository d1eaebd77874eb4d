"""Where quantisation goes, on small graphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engine.errors import EngineError
from engine.quantization.placement import find_placement

POOLS = {
    "behind a residual": (
        "a = Conv (image, w)  b = Relu (a)  c = Conv (b, w)  d = Add (c, b)  e = Relu (d)"
        "  p = MaxPool <kernel_shape = [1, 1]> (e)",
        "c",
    ),
    "behind a downsampling residual": (
        "a = Conv (image, w)  b = Relu (a)  c = Conv (b, w)  r = Relu (c)  m = Conv (r, w)"
        "  s = Conv (b, w)  d = Add (m, s)  p = MaxPool <kernel_shape = [1, 1]> (d)",
        "m",
    ),
    "beside another reader": (
        "a = Conv (image, w)  q = MaxPool <kernel_shape = [1, 1]> (a)  r = Relu (a)"
        "  p = Add (q, r)",
        "a",
    ),
    "behind another activation": (
        "a = Conv (image, w)  b = Sigmoid (a)  p = MaxPool <kernel_shape = [1, 1]> (b)",
        "a",
    ),
    "of the image": ("p = MaxPool <kernel_shape = [1, 1]> (image)", "loc"),
}


def parse(body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18, "trt.plugins": 1]>'
        "g (float[N, 3, 8, 8] image) => (float[N, 1, 7] boxes, int32[N] count)"
        f"{{ {body} boxes, count = trt.plugins.NMS_OPT_TRT (loc, conf, priors) }}"
    )
    for name, shape in (("w", (3, 3, 1, 1)), ("priors", (2, 4, 1))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    return model


@pytest.mark.parametrize(("body", "layer"), POOLS.values(), ids=POOLS.keys())
def test_every_max_pooling_reads_int8(body, layer) -> None:
    """Whatever makes its input; it is left float with the convolution that is nearest."""
    model = parse(f"{body} loc = Conv (p, w) conf = Conv (p, w)")
    placement = find_placement(model)
    (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
    (point,) = (point for point in placement.points if point.node == pool.output[0])
    assert point.tensor == pool.input[0]
    assert placement.layers[point.layer].node == layer


def test_a_detector_without_a_convolution_is_refused() -> None:
    with pytest.raises(EngineError, match="depend on no convolution"):
        find_placement(parse("loc = Relu (image) conf = Relu (image)"))

"""Small Q/DQ networks for tests; their scales are powers of two, so that float sums are exact."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Builds a network from the INT8 image on.

    Attributes
    ----------
    tensors
        Names of every INT8 tensor and head, for ONNX Runtime to return.
    shapes
        (channels, height, width) of the tensors.
    """

    def __init__(self, rng, *, stored=False):
        self.rng = rng
        self.stored = stored  # weights as int8 initialisers
        self.graph = onnx.GraphProto(name="made_up")
        self.tensors, self.shapes, self.scales, self.heads = [], {}, {}, []
        self.count = 0
        self.first = ""

    def image(self, channels, height, width):
        self.first = "image"
        shape = ["batch", channels, height, width]
        self.graph.input.append(helper.make_tensor_value_info("image", TensorProto.INT8, shape))
        self.shapes["image"] = (channels, height, width)
        self.scales["image"] = 2.0**-6
        return "image"

    def convolution(
        self,
        x,
        filters,
        kernel,
        *,
        stride=(1, 1),
        dilation=(1, 1),
        pads=(0, 0, 0, 0),
        relu=False,
        residual=None,
        quantized=True,
    ):
        number = self.count
        self.count += 1
        channels, height, width = self.shapes[x]
        pads, sizes = list(pads), []
        for axis, size in enumerate((height, width)):
            reach = (kernel[axis] - 1) * dilation[axis] + 1
            pads[axis] += max(0, reach - size - pads[axis] - pads[axis + 2])  # at least one place
            sizes.append((size + pads[axis] + pads[axis + 2] - reach) // stride[axis] + 1)
        weight = self.rng.integers(-127, 128, (filters, channels, *kernel), np.int8)
        steps = 2.0 ** self.rng.integers(-9, -6, filters)
        bias = np.float32(self.rng.integers(-64, 65, filters)) / 64
        name = self._weight(weight, np.float32(steps), f"weight_{number}")
        bias_name = self._constant(f"bias_{number}", bias)
        tensor = f"conv_{number}_out"
        self._node(
            "Conv",
            [self._dequantize(x), name, bias_name],
            tensor,
            f"conv_{number}",
            strides=stride,
            dilations=dilation,
            pads=pads,
            kernel_shape=kernel,
        )
        if residual is not None:
            summed = f"sum_{number}"
            self._node("Add", [tensor, self._dequantize(residual)], summed, f"add_{number}")
            tensor = summed
        if relu:
            self._node("Relu", [tensor], f"relu_{number}", f"node_relu_{number}")
            tensor = f"relu_{number}"
        shape = (filters, *sizes)
        if not quantized:
            self._done(tensor, shape, None)
            return tensor
        return self._quantize(tensor, shape, 2.0 ** self.rng.integers(-3, 1))

    def pool(self, x, kernel, *, stride=(1, 1), pads=(0, 0, 0, 0)):
        number = self.count
        self.count += 1
        channels, *sizes = self.shapes[x]
        placed = [
            (size + pads[axis] + pads[axis + 2] - kernel[axis]) // stride[axis] + 1
            for axis, size in enumerate(sizes)
        ]
        if min(placed) < 1:
            return x
        tensor = f"pool_{number}"
        self._node(
            "MaxPool",
            [self._dequantize(x)],
            tensor,
            f"node_pool_{number}",
            strides=stride,
            pads=pads,
            kernel_shape=kernel,
        )
        scale = self.scales[x] * 2.0 ** self.rng.integers(-1, 2)
        return self._quantize(tensor, (channels, *placed), scale)

    def head(self, x, filters, *, stride=(1, 1)):
        name = self.convolution(x, filters, (1, 1), stride=stride, quantized=False)
        self.heads.append(name)
        return name

    def shuffle(self):
        """Put the nodes into another order in which they can run."""
        rest, nodes = list(self.graph.node), []
        made = {"image", *(tensor.name for tensor in self.graph.initializer)}
        while rest:
            ready = [node for node in rest if made.issuperset(node.input)]
            nodes.append(ready[self.rng.integers(len(ready))])
            rest.remove(nodes[-1])
            made.update(nodes[-1].output)
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def model(self):
        del self.graph.output[:]
        for name in self.heads:
            shape = ["batch", *self.shapes[name]]
            self.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        opsets = [helper.make_opsetid("", 18)]
        model = helper.make_model(self.graph, opset_imports=opsets, ir_version=9)
        onnx.checker.check_model(model)
        return model

    def _done(self, name, shape, scale):
        self.tensors.append(name)
        self.shapes[name], self.scales[name] = shape, scale

    def _node(self, kind, inputs, output, name, **attributes):
        self.graph.node.append(helper.make_node(kind, inputs, [output], name, **attributes))

    def _constant(self, name, value):
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _step(self, name, scale):
        """Scale and zero point, as constants."""
        scale = np.float32(scale)
        zero = self._constant(f"{name}_zero", np.zeros(scale.shape, np.int8))
        return [self._constant(f"{name}_scale", scale), zero]

    def _quantize(self, name, shape, scale):
        result = f"{name}_quantized"
        step = self._step(result, scale)
        self._node("QuantizeLinear", [name, *step], result, f"q_{name}")
        self._done(result, shape, scale)
        return result

    def _dequantize(self, name):
        result = f"{name}_real_{len(self.graph.node)}"
        step = self._step(result, self.scales[name])
        self._node("DequantizeLinear", [name, *step], result, f"dq_{result}")
        return result

    def _weight(self, weight, steps, name):
        step = self._step(name, steps)
        if self.stored:
            stored = self._constant(name, weight)
        else:
            real = self._constant(name, weight * steps[:, None, None, None])
            stored = f"{name}_quantized"
            self._node("QuantizeLinear", [real, *step], stored, f"q_{name}", axis=0)
        self._node("DequantizeLinear", [stored, *step], f"{name}_real", f"dq_{name}", axis=0)
        return f"{name}_real"

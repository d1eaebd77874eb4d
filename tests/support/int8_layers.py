"""An INT8 graph in exact arithmetic: what its layers mean, and what of them cuDNN is given."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from engine.backends.cudnn.graph import Convolution
from engine.backends.cudnn.layers import (
    constants,
    conv_shape,
    pack_shape,
    padded,
    pool_multiplier,
    pool_shape,
)
from engine.backends.cudnn.plans import BIAS, MULTIPLIER, RESIDUAL_MULTIPLIER, WEIGHT


def exact_convolution(x, weight, window):
    """Sums as float64, exact: x [N, C, H, W], weight [K, C, R, S]."""
    top, left, bottom, right = window.pads
    x = F.pad(torch.from_numpy(x.astype(np.float64)), (left, right, top, bottom))
    weight = torch.from_numpy(weight.astype(np.float64))
    return F.conv2d(x, weight, stride=window.stride, dilation=window.dilation).numpy()


def rounded(real):
    return np.clip(np.rint(real), -128, 127).astype(np.int8)


def pooled(x, window, rows, columns):
    """Largest values, padding aside."""
    top, left, *_ = window.pads
    need = [
        (size - 1) * stride + kernel - pad - have
        for size, stride, kernel, pad, have in zip(
            (rows, columns), window.stride, window.kernel, (top, left), x.shape[2:], strict=True
        )
    ]
    pads = (left, max(need[1], 0), top, max(need[0], 0))
    filled = F.pad(torch.from_numpy(x.astype(np.float64)), pads, value=-np.inf)
    return F.max_pool2d(filled, window.kernel, window.stride).numpy()[..., :rows, :columns]


def run_layers(graph, images, given=None):
    """Every activation by name, as the docstring of engine.backends.cudnn.graph defines the layers.

    Those in `given` are there already.
    """
    found = {graph.image: images, **(given or {})}
    for layer in graph.layers:
        target = graph.tensors[layer.y]
        x, scale = found[layer.x], graph.tensors[layer.x].scale
        if isinstance(layer, Convolution):
            real = exact_convolution(x, layer.weight, layer.window)
            real = real * layer.multiplier[:, None, None] + layer.bias[:, None, None]
            if layer.residual is not None:
                real += found[layer.residual] * graph.tensors[layer.residual].scale
            if layer.relu:
                real = np.maximum(real, 0)
        else:
            real = pooled(x, layer.window, target.height, target.width) * scale
        found[layer.y] = real if target.scale is None else rounded(real / target.scale)
    return found


def run_as_cudnn(graph, images, given=None):
    """The same through the shapes, the packed image and the constants that cuDNN is given."""
    found = {graph.image: images}  # others NHWC with padded channels
    for name, value in (given or {}).items():
        fill = padded(value.shape[1]) - value.shape[1]
        found[name] = np.pad(value.transpose(0, 2, 3, 1), [(0, 0)] * 3 + [(0, fill)])
    batch = len(images)
    for layer in graph.layers:
        if not isinstance(layer, Convolution):
            shape = pool_shape(graph, layer, batch)
            assert found[layer.x].shape == (batch, shape.height, shape.width, shape.channels)
            x = found[layer.x].transpose(0, 3, 1, 2)
            largest = pooled(x, layer.window, shape.rows, shape.columns)
            y = rounded(largest * pool_multiplier(graph, layer)).transpose(0, 2, 3, 1)
            found[layer.y] = y
            continue
        shape = conv_shape(graph, layer, batch)
        fixed = constants(graph, layer)
        packing = pack_shape(graph, layer, shape)
        x = found[layer.x] if packing is None else packed(packing, images)
        assert x.shape == (batch, shape.height, shape.width, shape.channels)
        assert fixed[WEIGHT].dtype == shape.source
        assert fixed[WEIGHT].shape == (shape.filters, *shape.window.kernel, shape.channels)
        weight = fixed[WEIGHT].transpose(0, 3, 1, 2)
        real = exact_convolution(x.transpose(0, 3, 1, 2), weight, shape.window)
        real = real.transpose(0, 2, 3, 1) * fixed[MULTIPLIER] + fixed[BIAS]
        assert real.shape == (batch, shape.rows, shape.columns, shape.filters)
        assert shape.residual == (layer.residual is not None)
        if shape.residual:
            real += found[layer.residual] * fixed[RESIDUAL_MULTIPLIER]
        if shape.relu:
            real = np.maximum(real, 0)
        found[layer.y] = real if shape.target == "float16" else rounded(real)
    for name in found.keys() - {graph.image}:
        tensor = graph.tensors[name]
        assert found[name].shape[-1] == padded(tensor.channels)
        assert not found[name][..., tensor.channels :].any()
        found[name] = found[name][..., : tensor.channels].transpose(0, 3, 1, 2)
    return found


def packed(shape, images):
    """int8_layers_pack in numpy, from the comment of int8_layers.h."""
    result = np.zeros((shape.batch, shape.rows, shape.columns, shape.depth), np.float16)
    for i in range(shape.rows):
        for j in range(shape.columns):
            for a in range(shape.block_rows):
                for b in range(shape.block_columns):
                    row = shape.first_row + i * shape.block_rows + a
                    column = shape.first_column + j * shape.block_columns + b
                    if 0 <= row < shape.height and 0 <= column < shape.width:
                        block = shape.block_rows * shape.block_columns
                        first = a * shape.block_columns + b
                        last = first + block * shape.channels
                        result[:, i, j, first:last:block] = images[:, :, row, column]
    return result

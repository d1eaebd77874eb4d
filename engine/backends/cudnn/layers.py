"""The layers of an INT8 graph in the form that cuDNN takes: shapes, padded channels, weights.

Activations lie NHWC, their channels filled up to a multiple of 16 with zeros. The image, INT8 NCHW
with few channels, becomes float16 NHWC: every cell of stride x stride pixels is one pixel of the
packed image (space to depth), and the convolution one of stride 1. Float16 is exact here, for the
steps are integers below 2^11 and their sums stay below 2^24 in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.backends.cudnn.graph import Convolution, Int8Graph, Layer, MaxPool, Window
from engine.backends.cudnn.plans import (
    BIAS,
    MULTIPLIER,
    RESIDUAL_MULTIPLIER,
    WEIGHT,
    ConvShape,
)
from engine.errors import EngineError
from plugin_cuda.int8_layers import PackShape, PoolShape

_GROUP = 16
"""Channels of an INT8 tensor come in groups of 16 bytes."""

_EXACT_TAPS = 2**24 // 128**2
"""Products of two INT8 numbers whose sum float32 holds exactly."""

_NO_PADS = (0, 0, 0, 0)


@dataclass(frozen=True)
class Packing:
    """How the image is packed for a convolution.

    Attributes
    ----------
    block
        Pixels of a cell, (vertical, horizontal): the convolution's stride.
    first
        First pixel of the first cell, negative in the padding.
    taps
        Size of the kernel in cells.
    depth
        Channels of the packed image.
    """

    block: tuple[int, int]
    first: tuple[int, int]
    taps: tuple[int, int]
    depth: int


def padded(channels: int) -> int:
    """Channels that a tensor of so many takes in memory."""
    return -(-channels // _GROUP) * _GROUP


def tensor_bytes(graph: Int8Graph, name: str, batch: int) -> int:
    """Bytes of an activation: int8, or float16 for a head."""
    tensor = graph.tensors[name]
    size = 1 if tensor.scale is not None else 2
    return batch * padded(tensor.channels) * tensor.height * tensor.width * size


def groups(graph: Int8Graph) -> list[tuple[Layer, ...]]:
    """Layers that run as one: a pooling joins the convolution whose only reader it is."""
    found: list[tuple[Layer, ...]] = []
    joined: set[str] = set()
    for layer in graph.layers:
        readers = graph.readers(layer.y)
        if layer.y in joined:
            continue
        if isinstance(layer, Convolution) and len(readers) == 1 and isinstance(readers[0], MaxPool):
            joined.add(readers[0].y)
            found.append((layer, readers[0]))
        else:
            found.append((layer,))
    return found


def packing(graph: Int8Graph, layer: Convolution) -> Packing | None:
    """How the image is packed for a layer; None for a layer that does not read the image.

    Raises
    ------
    EngineError
        When its kernel is so large that the packed convolution would not be exact.
    """
    if layer.x != graph.image:
        return None
    _, channels, height, width = layer.weight.shape
    window = layer.window
    if channels * height * width > _EXACT_TAPS:
        raise EngineError(
            f"the convolution {layer.name} reads the image with {channels * height * width} "
            f"products a sum; at most {_EXACT_TAPS} are supported"
        )
    first, taps = [], []
    for axis, size in enumerate((height, width)):
        stride, pad = window.stride[axis], window.pads[axis]
        reach = (size - 1) * window.dilation[axis] - pad
        first.append(-pad // stride)
        taps.append(reach // stride - first[-1] + 1)
    block = window.stride
    return Packing(
        block=block,
        first=(first[0] * block[0], first[1] * block[1]),
        taps=(taps[0], taps[1]),
        depth=padded(channels * block[0] * block[1]),
    )


def conv_shape(graph: Int8Graph, layer: Convolution, batch: int) -> ConvShape:
    """Shape of a layer's cuDNN graph."""
    source, target = graph.tensors[layer.x], graph.tensors[layer.y]
    packed = packing(graph, layer)
    height, width, channels, window = (
        source.height,
        source.width,
        padded(source.channels),
        layer.window,
    )
    if packed is not None:
        height = target.height + packed.taps[0] - 1
        width = target.width + packed.taps[1] - 1
        channels = packed.depth
        window = Window(packed.taps, (1, 1), (1, 1), _NO_PADS)
    return ConvShape(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        filters=padded(target.channels),
        window=window,
        source="int8" if packed is None else "float16",
        target="float16" if target.scale is None else "int8",
        residual=layer.residual is not None,
        relu=layer.relu,
    )


def pack_shape(graph: Int8Graph, layer: Convolution, shape: ConvShape) -> PackShape | None:
    """Packing of the image in front of a layer; None for a layer that does not read it."""
    packed = packing(graph, layer)
    image = graph.tensors[layer.x]
    if packed is None:
        return None
    sizes = (image.channels, image.height, image.width, shape.height, shape.width, packed.depth)
    return PackShape(shape.batch, *sizes, *packed.block, *packed.first)


def pool_shape(graph: Int8Graph, layer: MaxPool, batch: int) -> PoolShape:
    """Shape of a pooling.

    Raises
    ------
    EngineError
        When it reads the image.
    """
    if layer.x == graph.image:
        raise EngineError(f"the pooling {layer.name} reads the image, which is not supported")
    source, target = graph.tensors[layer.x], graph.tensors[layer.y]
    return PoolShape(
        batch,
        padded(source.channels),
        source.height,
        source.width,
        target.height,
        target.width,
        *layer.window.kernel,
        *layer.window.stride,
        *layer.window.pads[:2],
    )


def pool_multiplier(graph: Int8Graph, layer: MaxPool) -> float:
    """Scale of a pooling's input over that of its output."""
    source, target = graph.tensors[layer.x].scale, graph.tensors[layer.y].scale
    if source is None or target is None:  # the graph has none such
        raise EngineError(f"the pooling {layer.name} is not INT8")
    return source / target


def constants(graph: Int8Graph, layer: Convolution) -> Mapping[int, NDArray[np.generic]]:
    """Constant tensors of a layer's cuDNN graph by their numbers.

    Returns
    -------
    dict
        WEIGHT int8 or float16 [filters, height, width, channels]; MULTIPLIER and BIAS float32
        [filters], divided by y's scale; RESIDUAL_MULTIPLIER float32 [1].
    """
    target = graph.tensors[layer.y]
    filters, channels = layer.weight.shape[:2]
    step = np.float64(1.0 if target.scale is None else target.scale)
    packed = packing(graph, layer)
    if packed is None:
        weight = np.zeros(
            (padded(filters), *layer.window.kernel, padded(channels)), layer.weight.dtype
        )
        weight[:filters, ..., :channels] = layer.weight.transpose(0, 2, 3, 1)
    else:
        weight = _packed_weight(layer, packed).astype(np.float16)
    found: dict[int, NDArray[np.generic]] = {WEIGHT: weight}
    for number, values in ((MULTIPLIER, layer.multiplier), (BIAS, layer.bias)):
        found[number] = np.zeros(padded(filters), np.float32)
        found[number][:filters] = (values / step).astype(np.float32)
    if layer.residual is not None:
        scale = graph.tensors[layer.residual].scale
        found[RESIDUAL_MULTIPLIER] = np.array([(scale or 0.0) / step], np.float32)
    return found


def _packed_weight(layer: Convolution, packed: Packing) -> NDArray[np.int8]:
    """Weight of the convolution on the packed image: [filters, taps, taps, depth]."""
    filters, channels, height, width = layer.weight.shape
    window = layer.window
    weight = np.zeros((padded(filters), *packed.taps, packed.depth), np.int8)
    for row in range(height):
        y = row * window.dilation[0] - window.pads[0] - packed.first[0]
        tap_y, a = divmod(y, packed.block[0])
        for column in range(width):
            x = column * window.dilation[1] - window.pads[1] - packed.first[1]
            tap_x, b = divmod(x, packed.block[1])
            for channel in range(channels):
                place = (channel * packed.block[0] + a) * packed.block[1] + b
                weight[:filters, tap_y, tap_x, place] = layer.weight[:, channel, row, column]
    return weight

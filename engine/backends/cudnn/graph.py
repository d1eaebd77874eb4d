"""An INT8 Q/DQ graph as a list of fused layers, for engines that run INT8 kernels themselves.

What lies between one quantisation and the next is one layer. With s the scale of a tensor, acc the
exact integer convolution of zero-padded x and w:

    real = acc * multiplier + bias            multiplier = s_x * s_w, for each channel
    real = real + r * s_r                     where there is a residual
    real = max(real, 0)                       where there is a ReLU
    y    = clip(rint(real / s_y), -128, 127)  or real itself, for a head

A pooling between two quantisations is a layer of its own: y = clip(rint(max(x) * s_x / s_y)).

`engine.backends.cudnn.reader` reads it from ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tensor:
    """An activation.

    Attributes
    ----------
    channels, height, width
        Of one image.
    scale
        Real value of one step of an INT8 tensor; None: float16, a head.
    """

    channels: int
    height: int
    width: int
    scale: float | None


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input.

    Attributes
    ----------
    kernel, stride, dilation
        (vertical, horizontal).
    pads
        (top, left, bottom, right).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]


@dataclass(frozen=True)
class Convolution:
    """A convolution and what is fused into it.

    Attributes
    ----------
    name
        Of its node in the graph; of two that were merged, both.
    x, residual, y
        Tensors of `Int8Graph.tensors`; residual may be None.
    weight
        int8 [filters, channels, height, width].
    multiplier, bias
        float32 [filters].
    window
        Its geometry.
    relu
        Whether negative values become 0.
    """

    name: str
    x: str
    y: str
    residual: str | None
    weight: NDArray[np.int8] = field(repr=False)
    multiplier: NDArray[np.float32] = field(repr=False)
    bias: NDArray[np.float32] = field(repr=False)
    window: Window
    relu: bool


@dataclass(frozen=True)
class MaxPool:
    """A pooling of INT8 and its requantisation; padding never wins."""

    name: str
    x: str
    y: str
    window: Window


Layer = Convolution | MaxPool


@dataclass(frozen=True)
class Head:
    """Where a head tensor lies: `channels` of tensor `tensor` from channel `first` on."""

    tensor: str
    first: int
    channels: int


@dataclass(frozen=True)
class Int8Graph:
    """A network from the INT8 image to the heads.

    Attributes
    ----------
    image
        Name of the graph input among the tensors.
    tensors
        Every activation.
    layers
        In an order in which they can run.
    heads
        The outputs of the network by their names in the ONNX graph.
    """

    image: str
    tensors: Mapping[str, Tensor]
    layers: tuple[Layer, ...]
    heads: Mapping[str, Head]

    def readers(self, tensor: str) -> list[Layer]:
        """Layers that read a tensor."""
        return [
            layer
            for layer in self.layers
            if tensor in (layer.x, layer.residual if isinstance(layer, Convolution) else None)
        ]

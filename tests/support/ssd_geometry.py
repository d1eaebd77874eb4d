"""SSD-ResNet34 at full size as an INT8 graph of zeros: geometry alone (facts of the reference)."""

from __future__ import annotations

import numpy as np

from engine.backends.cudnn.graph import Convolution, Head, Int8Graph, MaxPool, Tensor, Window

SCALE = 0.0625


class _Network:
    def __init__(self, size):
        self.tensors = {"image": Tensor(3, size, size, SCALE)}
        self.layers, self.heads = [], {}

    def convolution(self, x, filters, kernel, *, stride=1, pad=None, residual=None, head=False):
        source = self.tensors[x]
        pad = kernel // 2 if pad is None else pad
        window = Window((kernel,) * 2, (stride,) * 2, (1, 1), (pad,) * 4)
        height, width = (
            (size + 2 * pad - kernel) // stride + 1 for size in (source.height, source.width)
        )
        y = f"t{len(self.layers)}"
        self.tensors[y] = Tensor(filters, height, width, None if head else SCALE)
        weight = np.zeros((filters, source.channels, kernel, kernel), np.int8)
        ones = np.ones(filters, np.float32)
        self.layers.append(
            Convolution(f"conv {y}", x, y, residual, weight, ones, ones, window, not head)
        )
        return y

    def pool(self, x):
        source = self.tensors[x]
        y = f"t{len(self.layers)}"
        size = (source.height + 1) // 2, (source.width + 1) // 2
        self.tensors[y] = Tensor(source.channels, *size, SCALE)
        self.layers.append(MaxPool("pool", x, y, Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1))))
        return y

    def block(self, x, filters, stride=1):
        skipped = x
        if stride > 1 or self.tensors[x].channels != filters:
            skipped = self.convolution(x, filters, 1, stride=stride)
        inner = self.convolution(x, filters, 3, stride=stride)
        return self.convolution(inner, filters, 3, residual=skipped)


def ssd_graph(size=1200):
    """The network at any image size, loc and conf of a level merged already."""
    net = _Network(size)
    x = net.pool(net.convolution("image", 64, 7, stride=2))
    for filters, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 1)):
        for index in range(blocks):
            x = net.block(x, filters, stride if index == 0 else 1)
    levels = [x]
    for inner, filters, stride, pad in (
        (256, 512, 2, 1),
        (256, 512, 2, 1),
        (128, 256, 2, 1),
        (128, 256, 2, 0),
        (128, 256, 1, 0),
    ):
        x = net.convolution(net.convolution(x, inner, 1), filters, 3, stride=stride, pad=pad)
        levels.append(x)
    for x, anchors in zip(levels, (4, 6, 6, 6, 4, 4), strict=True):
        y = net.convolution(x, anchors * 85, 3, stride=3, head=True)
        net.heads[f"loc {y}"] = Head(y, 0, anchors * 4)
        net.heads[f"conf {y}"] = Head(y, anchors * 4, anchors * 81)
    return Int8Graph("image", net.tensors, tuple(net.layers), net.heads)

"""Layers that libint8_conv.so can run in cuDNN's place, on GPUs of compute capability 9.0."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.backends.cudnn.graph import Convolution, Int8Graph, Layer, MaxPool, Window
from engine.backends.cudnn.plans import BIAS, MULTIPLIER, WEIGHT
from engine.backends.cudnn.program import Candidate, Places, Run
from engine.support.files import file_sha256
from plugin_cuda.errors import PluginError
from plugin_cuda.int8_conv import (
    COMPUTE_CAPABILITY,
    CONV3X3_CHANNELS,
    STEM_CHANNELS,
    STEM_MULTIPLE,
    conv3x3,
    conv_library_path,
    load_conv_library,
    stem,
    stem_weight,
)

_LOG = logging.getLogger(__name__)

STEM_WEIGHT = 100
"""Number of the stem's arranged weights among the constants of a layer; cuDNN's are smaller."""

_CONV = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
_STEM = Window((7, 7), (2, 2), (1, 1), (3, 3, 3, 3))
_POOL = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1))


@dataclass(frozen=True)
class Hopper:
    """libint8_conv.so, and the SHA-256 of its file."""

    library: ctypes.CDLL
    sha256: str


def hopper_library(compute_capability: str) -> Hopper | None:
    """Load libint8_conv.so where the GPU can run it; without it, say so and do without."""
    if compute_capability != COMPUTE_CAPABILITY:
        return None
    try:
        return Hopper(load_conv_library(), file_sha256(conv_library_path()))
    except PluginError as error:
        _LOG.warning("slower than it could be: %s", error)
        return None


def is_conv3x3(graph: Int8Graph, group: Sequence[Layer]) -> bool:
    """Whether int8_conv_3x3 runs this group of layers."""
    layer = group[0]
    return (
        len(group) == 1
        and isinstance(layer, Convolution)
        and layer.x != graph.image
        and layer.relu
        and layer.window == _CONV
        and graph.tensors[layer.y].scale is not None
        and layer.weight.shape[1] in CONV3X3_CHANNELS
        and layer.weight.shape[0] % CONV3X3_CHANNELS[layer.weight.shape[1]] == 0
    )


def is_stem(graph: Int8Graph, group: Sequence[Layer]) -> bool:
    """Whether int8_conv_stem runs this group of layers."""
    first, last = group[0], group[-1]
    image, target = graph.tensors[graph.image], graph.tensors[last.y]
    return (
        isinstance(first, Convolution)
        and isinstance(last, MaxPool)
        and first.x == graph.image
        and first.relu
        and first.residual is None
        and first.weight.shape[:2] == (STEM_CHANNELS, 3)
        and (first.window, last.window) == (_STEM, _POOL)
        and (image.height, image.width)
        == (STEM_MULTIPLE * target.height, STEM_MULTIPLE * target.width)
    )


def stem_constants(graph: Int8Graph, group: Sequence[Layer]) -> dict[int, NDArray[np.generic]]:
    """Constants that `hopper_candidate` needs besides cuDNN's: STEM_WEIGHT, or nothing."""
    first = group[0]
    if isinstance(first, Convolution) and is_stem(graph, group):
        return {STEM_WEIGHT: stem_weight(first.weight)}
    return {}


def hopper_candidate(
    library: ctypes.CDLL,
    graph: Int8Graph,
    batch: int,
    group: Sequence[Layer],
    constants: Mapping[int, int],
) -> Candidate | None:
    """The way to run a group of layers with libint8_conv.so, if there is one.

    Parameters
    ----------
    constants
        Device addresses of the convolution's constants.
    """
    layer, last = group[0], group[-1]
    if isinstance(layer, MaxPool):
        return None
    source, target = graph.tensors[layer.x], graph.tensors[last.y]
    if is_stem(graph, group):
        between = graph.tensors[layer.y].scale or 0.0
        pool_multiplier = between / (target.scale or 1.0)

        def bind_stem(places: Places) -> Run:
            return stem(
                batch,
                source.height,
                source.width,
                x=places.x,
                weight=constants[STEM_WEIGHT],
                multiplier=constants[MULTIPLIER],
                bias=constants[BIAS],
                pool_multiplier=pool_multiplier,
                y=places.y,
                library=library,
            )

        return Candidate("int8_conv_stem", 0, bind_stem)
    if not is_conv3x3(graph, group):
        return None
    skipped = 0.0 if layer.residual is None else graph.tensors[layer.residual].scale or 0.0
    residual_multiplier = skipped / (target.scale or 1.0)

    def bind_conv(places: Places) -> Run:
        return conv3x3(
            batch,
            source.height,
            source.width,
            source.channels,
            target.channels,
            x=places.x,
            weight=constants[WEIGHT],
            multiplier=constants[MULTIPLIER],
            bias=constants[BIAS],
            y=places.y,
            residual=places.residual,
            residual_multiplier=residual_multiplier,
            library=library,
        )

    return Candidate("int8_conv_3x3", 0, bind_conv)

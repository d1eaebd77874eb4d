"""Fields and tensors to give to a plugin of NMS_OPT_TRT."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graph_surgery.nms_function import OURS, NmsAttributes
from tests.support.nms_cases import SSD
from tests.support.plugin_driver import (
    FLOAT,
    FLOAT32,
    INT32,
    LINEAR,
    NUMPY,
    TYPE_INT32,
    Field,
    desc,
    dynamic,
    fixed,
)

FLOATS = ("confidenceThreshold", "nmsThreshold", "bboxXformClip")
KINDS = {name: FLOAT32 if name in FLOATS else INT32 for name in NmsAttributes.__dataclass_fields__}
NVIDIAS = [name for name in KINDS if name not in OURS]
"""The attributes of version 1."""


@dataclass(frozen=True)
class Given:
    """A field as a caller gives it; without `values` it has no data."""

    name: str | None
    kind: int
    values: object
    length: int | None = None

    def to_c(self, alive: list) -> Field:
        data, count = None, 0
        if self.values is not None:
            held = np.atleast_1d(np.array(self.values, NUMPY.get(self.kind, np.float32)))
            alive.append(held)
            data, count = held.ctypes.data, len(held)
        name = None if self.name is None else self.name.encode()
        return Field(name, data, self.kind, count if self.length is None else self.length)


def carried(attributes: NmsAttributes) -> dict:
    """What a node of these attributes' version carries."""
    return {name: value for name, value in attributes.written.items() if name in KINDS}


def given_fields(attributes: NmsAttributes = SSD, **kinds) -> list[Given]:
    return [
        Given(name, kinds.get(name, KINDS[name]), value)
        for name, value in carried(attributes).items()
    ]


def create(driver, fields, version=1):
    alive: list = []
    return driver.create([item.to_c(alive) for item in fields], version)


def make(driver, attributes=SSD):
    plugin = create(driver, given_fields(attributes), attributes.version)
    assert plugin is not None, driver.messages()
    return plugin


def wanted(attributes) -> dict:
    """What `read_fields` finds for a plugin with these attributes."""
    result = {}
    for name, value in carried(attributes).items():
        values = np.atleast_1d(np.array(value, NUMPY[KINDS[name]])).tolist()
        result[name] = (KINDS[name], len(values), values)
    return result


def refused(driver, fields, *parts, version=1) -> None:
    """No plugin, and one error that names every part."""
    assert create(driver, fields, version) is None
    message = driver.messages()
    assert message.startswith("1 NMS_OPT_TRT: "), message  # 1: kERROR
    assert message.count("\n") == 1
    for part in parts:
        assert str(part) in message, message


def heads(attributes, levels, batch, *, loc=(FLOAT, LINEAR), conf=(FLOAT, LINEAR), scale=-1.0):
    """All tensors, inputs and outputs, for levels of (anchors, height, width)."""
    classes, rows = attributes.numClasses, attributes.keepTopK
    count = sum(a * h * w for a, h, w in levels)
    return [
        *(desc([batch, 4 * a, h, w], *loc) for a, h, w in levels),
        *(desc([batch, classes * a, h, w], *conf, scale) for a, h, w in levels),
        desc([2, 4 * count, 1]),
        desc([batch, rows, 7]),
        desc([batch], TYPE_INT32),
    ]


def profile(tensors, least, best, most):
    priors = len(tensors) - 3
    return [
        fixed(tensor) if i == priors else dynamic(tensor, least, best, most)
        for i, tensor in enumerate(tensors)
    ]

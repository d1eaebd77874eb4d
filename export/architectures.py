"""The detectors that there are."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from export.architecture import Architecture
from export.errors import ExportError
from export.retinanet import RETINANET
from export.ssd_resnet34 import SSD_RESNET34

ARCHITECTURES = {one.name: one for one in (SSD_RESNET34, RETINANET)}


def by_name(name: str) -> Architecture:
    """Find a detector. Raises ExportError where there is none of that name."""
    if name not in ARCHITECTURES:
        raise ExportError(f"no model {name!r}; there are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def by_weights(names: Iterable[str], metadata: Iterable[str] = ()) -> Architecture:
    """Find the detector whose configuration is in the metadata, else that of most names.

    Where no name tells, it is the first: the check of its names then says what is missing.
    """
    stated = [one for one in ARCHITECTURES.values() if one.config_key in metadata]
    if stated:
        return stated[0]

    def known(architecture: Architecture) -> int:
        with torch.device("meta"):
            expected = architecture.network(architecture.config()).state_dict()
        return len({architecture.own_name(name) for name in found} & expected.keys())

    found = set(names)
    return max(ARCHITECTURES.values(), key=known)

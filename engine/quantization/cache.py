"""The calibration cache: scales and what they belong to, as JSON and in TensorRT's text format."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
from pydantic import AfterValidator, Field

from engine.data.preprocessed import preprocessing_sha256
from engine.errors import EngineError
from engine.quantization.network import network_sha256
from engine.quantization.placement import Placement
from engine.quantization.thresholds import METHODS
from engine.support.documents import checked, one_of, read_json
from engine.support.files import write_atomically

_FORMAT = 3
_TRT_NAMES = {
    "auto": "MinMaxCalibration",  # TensorRT has no name for it
    "entropy": "EntropyCalibration2",
    "minmax": "MinMaxCalibration",
}
_TRT_HEADER = re.compile(r"TRT-\d+-\w+")
_DAMAGED = "no calibration cache, or a damaged one"


def _by_every_method(scales: Mapping[str, float]) -> Mapping[str, float]:
    if scales.keys() != set(METHODS):
        raise ValueError(f"a scale by each of {', '.join(METHODS)}")
    return scales


Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Statistics:
    """What quantisation does to a tensor of the calibration images.

    Attributes
    ----------
    scales
        Its scale by each of `engine.quantization.thresholds.METHODS`.
    clipped
        Share of its values that the scale that was taken clips, in [0, 1].
    snr_db
        Power of its values over that of their error by that scale, in dB.
    """

    scales: Annotated[Mapping[str, Scale], AfterValidator(_by_every_method)]
    clipped: Annotated[float, Field(ge=0, le=1)]
    snr_db: float  # infinite without an error


@dataclass(frozen=True)
class Calibration:
    """Scales, what they belong to, and how good they are.

    Attributes
    ----------
    scales
        Tensor name to the real value of one INT8 step (symmetric, zero point 0).
    method
        How thresholds were chosen, one of `engine.quantization.thresholds.METHODS`; that of the
        image never is.
    images
        Number of images.
    images_sha256
        Hash of their names and values.
    model_sha256
        Hash of the network between image and heads, see `network_sha256`.
    preprocessing_sha256
        Hash of image size and normalisation.
    versions
        Package to version.
    empty_images
        Images that are one colour, or in which the detector finds nothing.
    largest
        Largest magnitude of every tensor of `Placement.floats`.
    statistics
        Of every tensor with a scale that is neither the image nor 0 everywhere.
    model
        Name of the detector's file; empty in caches from before 0.2.
    sums
        Scales of `Placement.mains`; none in caches from before.
    """

    scales: Mapping[str, Scale]
    method: Annotated[str, one_of(METHODS)]
    images: Count
    images_sha256: str
    model_sha256: str
    preprocessing_sha256: str
    versions: Mapping[str, str]
    empty_images: Count
    largest: Mapping[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    statistics: Mapping[str, Statistics]
    model: str = ""
    sums: Mapping[str, Scale] = field(default_factory=dict)

    @property
    def changed(self) -> str | None:
        """Which scales are not those that the method gave; None: all are."""
        known = {name: one.scales[self.method] for name, one in self.statistics.items()}
        others = [name for name, scale in known.items() if self.scales.get(name) != scale]
        if not others:
            return None
        return (
            f"{len(others)} of {len(known)} scales, the first of {others[0]!r}, are not what "
            f"{self.method} made of the images: the cache was changed since"
        )

    @property
    def warning(self) -> str | None:
        """What speaks against the images that these scales are from."""
        if self.empty_images <= self.images / 2:
            return None
        return (
            f"{self.empty_images} of {self.images} calibration images show nothing: they are one "
            "colour, or the FP32 detector finds nothing in them. Scales from such images may ruin "
            "a model; calibrate with pictures of what it is to find"
        )

    def save(self, path: Path) -> None:
        """Write the JSON cache.

        Raises
        ------
        EngineError
            When the file cannot be written.
        """
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"
        try:
            write_atomically(path, text.encode())
        except OSError as error:
            raise EngineError(f"{path}: cannot write it: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a JSON cache.

        Raises
        ------
        EngineError
            When the file is missing, damaged, of another format, or has an unusable scale.
        """
        content = read_json(path, _DAMAGED, infinite=True)
        if not isinstance(content, dict) or "format" not in content:
            raise EngineError(f"{path}: {_DAMAGED}")
        if content.pop("format") != _FORMAT:
            raise EngineError(
                f"{path}: a calibration cache of another format; make it anew: 'engine "
                f"calibrate MODEL --data FOLDER -o {path} --force'"
            )
        return checked(cls, content, f"{path}: ", _DAMAGED)

    def check(self, model: onnx.ModelProto, placement: Placement) -> None:
        """Make sure that the scales are those of a model.

        Raises
        ------
        EngineError
            When preprocessing, tensors or weights differ; says which.
        """
        if self.preprocessing_sha256 != preprocessing_sha256(placement.shape):
            raise EngineError(
                "the calibration belongs to another preprocessing (image size or normalisation); "
                "calibrate this model"
            )
        for what, names in (
            ("has no scale for", set(placement.tensors) - self.scales.keys()),
            (
                "has a scale for a tensor that is not quantised,",
                self.scales.keys() - set(placement.tensors),
            ),
        ):
            if names:
                raise EngineError(
                    f"the calibration belongs to another model: it {what} {min(names)!r}"
                    f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}; "
                    "calibrate this model"
                )
        if self.model_sha256 != network_sha256(model, placement):
            raise EngineError(
                "the calibration belongs to another model: the same tensors, but other weights or "
                "attributes; calibrate this model"
            )

    def to_trt(self) -> str:
        """Write the scales in the text format of TensorRT's calibrators, a line each.

        Raises
        ------
        EngineError
            When a tensor name holds a line break.
        """
        lines = [f"TRT-100000-{_TRT_NAMES[self.method]}"]
        for name, scale in self.scales.items():
            if len(name.splitlines()) != 1:
                raise EngineError(f"tensor name {name!r} does not fit in TensorRT's cache format")
            lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
        return "\n".join(lines) + "\n"


def parse_trt(text: str) -> dict[str, float]:
    """Read the scales of a TensorRT calibration cache.

    Parameters
    ----------
    text
        A header line, then for every tensor ``name: 8 hex digits``, the big-endian bits of the
        float32 scale.

    Raises
    ------
    EngineError
        When it is anything else; names the line.
    """
    header, *lines = text.splitlines() or [""]
    if not _TRT_HEADER.fullmatch(header.strip()):
        raise EngineError(f"line 1: {header!r} is no header of a TensorRT calibration cache")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        name, separator, digits = line.rpartition(": ")
        if not separator or not re.fullmatch(r"[0-9a-fA-F]{8}", digits.strip()):
            raise EngineError(f"line {number}: {line!r} is not 'name: 8 hex digits'")
        if name in scales:
            raise EngineError(f"line {number}: a second scale for {name!r}")
        (scale,) = struct.unpack(">f", bytes.fromhex(digits.strip()))
        if not 0 < scale < np.inf:
            raise EngineError(f"line {number}: tensor {name!r} has the scale {scale}")
        scales[name] = scale
    return scales

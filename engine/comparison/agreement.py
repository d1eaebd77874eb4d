"""What an INT8 detector still finds of what its FP32 original finds, on a few images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.matching import match_detections
from engine.data.preprocessed import PreprocessedSet, quantize_images
from engine.errors import EngineError
from engine.load import load_engine
from engine.protocol import InputSpec, Session

IMAGES = 16
"""Images that `find_agreement` looks at."""

MIN_IOU = 0.5
"""Least overlap of a detection with its partner: COCO's for the same object."""

MIN_SHARE = 0.8
"""Least share of FP32 detections that INT8 must find again."""


@dataclass(frozen=True)
class Agreement:
    """FP32 detections that INT8 finds again, of the same label and with IoU >= `MIN_IOU`.

    Attributes
    ----------
    images
        Number of images.
    detections
        FP32 detections on them.
    matched
        Those with an INT8 detection as their partner, each of its own.
    """

    images: int
    detections: int
    matched: int

    @property
    def passed(self) -> bool:
        """Whether they are `MIN_SHARE` of all; without any, nothing speaks against it."""
        return self.matched >= MIN_SHARE * self.detections


def find_agreement(float_model: Path, int8_model: Path, images: PreprocessedSet) -> Agreement:
    """Run both in ONNX Runtime on `IMAGES` images, spread evenly over a set.

    Parameters
    ----------
    float_model, int8_model
        The detector before and after `engine.quantization.quantize.quantize`.
    images
        float32 images of its input.

    Raises
    ------
    EngineError
        When a model or an image is unusable, or there is none.
    """
    sides = [load_engine("onnxruntime", path) for path in (float_model, int8_model)]
    if not images.files:
        raise EngineError(f"{images.directory}: no images to check with")
    chosen = np.unique(np.linspace(0, len(images.files) - 1, IMAGES).round().astype(int)).tolist()
    detections = matched = 0
    sessions = [(side.session(), side.input_spec) for side in sides]
    for index in chosen:
        image = images.load([index]).astype(np.float32, copy=False)
        first, second = (_detect(session, spec, image) for session, spec in sessions)
        detections += len(first)
        matched += len(match_detections(first, second, MIN_IOU).pairs)
    return Agreement(len(chosen), detections, matched)


def _detect(session: Session, spec: InputSpec, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Valid rows of one image, float32 [n, 7]."""
    rows, counts = session.infer(quantize_images(image, spec))
    found: NDArray[np.float32] = rows[0, : counts[0]]
    return found

"""What a model file holds, for a server that serves it and for the clients of that server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError
from engine.manifest import Manifest, load_manifest
from engine.model import load_detector
from engine.protocol import (
    DETECTION_FIELDS,
    DETECTIONS,
    NUM_DETECTIONS,
    InputSpec,
    corrections_of,
)


@dataclass(frozen=True)
class ServedModel:
    """A detector in a file.

    Attributes
    ----------
    path
        The file.
    backend
        Engine that loads it: ``onnxruntime``, or what the manifest beside an engine file says.
    onnx_sha256
        Content of the ONNX file that it is or was built from.
    input
        Image tensor that it takes.
    keep_top_k
        Rows of ``detections`` for each image.
    first_label
        Label of the first class.
    corrections
        What a run's manifest says of corrections, see `engine.protocol.corrections_of`.
    manifest
        Manifest beside an engine file; None for an ONNX file.
    """

    path: Path
    backend: str
    onnx_sha256: str
    input: InputSpec
    keep_top_k: int
    first_label: int
    corrections: Mapping[str, str]
    manifest: Manifest | None

    def identity(self) -> Mapping[str, str]:
        """What servers and clients of one model agree on, as texts."""
        scale = {} if self.input.scale is None else {"input_scale": repr(self.input.scale)}
        return {"onnx_sha256": self.onnx_sha256, **scale}


def served_model(path: Path) -> ServedModel:
    """Describe an ONNX detector with a dynamic batch, or an engine with its manifest.

    Raises
    ------
    EngineError
        When it is neither, or damaged.
    """
    if path.suffix != ".onnx":
        manifest = load_manifest(path)
        return ServedModel(
            path,
            manifest.backend,
            manifest.onnx_sha256,
            manifest.input,
            manifest.keep_top_k,
            manifest.first_label,
            corrections_of(manifest.metadata),
            manifest,
        )
    detector = load_detector(path)
    keep_top_k, image = detector.keep_top_k, detector.input
    if keep_top_k is None:
        raise EngineError(
            f"{path}: no outputs {DETECTIONS} [N, keepTopK, {DETECTION_FIELDS}] and "
            f"{NUM_DETECTIONS} [N] with a fixed keepTopK; export the model with 'export-onnx'"
        )
    detector.require_dynamic_batch()
    return ServedModel(
        path,
        "onnxruntime",
        detector.sha256,
        image,
        keep_top_k,
        detector.first_label,
        corrections_of(detector.metadata),
        None,
    )

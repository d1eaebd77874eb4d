"""An engine file that no TensorRT made, and what its manifest says."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

from engine.manifest import Manifest
from engine.protocol import InputSpec

PLAN = b"a plan that no TensorRT made"


def manifest(**changes) -> Manifest:
    """The manifest of `PLAN`, with changes."""
    return replace(
        Manifest(
            backend="tensorrt",
            version="10.16.1.11",
            gpu="NVIDIA H100 80GB HBM3",
            compute_capabilities=("9.0",),
            model="model.onnx",
            onnx_sha256="1" * 64,
            plugins=(),
            metadata={"calibration_method": "entropy"},
            engine_sha256=sha256(PLAN).hexdigest(),
            engine_bytes=len(PLAN),
            input=InputSpec("image", (3, 400, 400), "int8", 0.02),
            min_batch=1,
            opt_batch=8,
            max_batch=16,
            options={},
            seconds=1.5,
        ),
        **changes,
    )

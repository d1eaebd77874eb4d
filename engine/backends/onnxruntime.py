"""ONNX Runtime: the engine that runs everywhere, and the reference for the others."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.files import file_sha256
from engine.protocol import DETECTION_FIELDS, EngineError, InputSpec

if TYPE_CHECKING:
    import onnxruntime

INPUT_SCALE_KEY = "input_scale"
"""ONNX metadata key that holds the real value of one step of an INT8 image input."""

_OUTPUTS = ["detections", "num_detections"]
_DTYPES: dict[str, Literal["float32", "int8"]] = {
    "tensor(float)": "float32",
    "tensor(int8)": "int8",
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load(model: Path, *, device: str = "cpu", threads: int | None = None) -> OnnxRuntimeEngine:
    """Load an ONNX detector whose outputs are ``detections`` and ``num_detections``.

    Parameters
    ----------
    model
        ONNX file with one image input, float32 or int8 [N, 3, H, W], H and W fixed. An int8 input
        needs the metadata key `INPUT_SCALE_KEY`.
    device
        ``cpu`` or ``cuda``.
    threads
        Threads within one operator; None: one for each CPU the process may use.

    Raises
    ------
    EngineError
        When ONNX Runtime is missing, has no such device, or the model is not such a detector.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EngineError(
            "the engine 'onnxruntime' needs ONNX Runtime: pip install onnxruntime"
        ) from error
    if not model.is_file():
        raise EngineError(f"{model}: no such model file")
    if device not in _PROVIDERS:
        raise EngineError(f"unknown device {device!r}; choose one of: {', '.join(_PROVIDERS)}")
    provider = _PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise EngineError(
            f"this ONNX Runtime {ort.__version__} has no {provider}; "
            "install onnxruntime-gpu for it or use --device cpu"
        )
    threads = threads or len(os.sched_getaffinity(0))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(model), options, providers=[provider])
    except Exception as error:  # ORT's exceptions share no base class but Exception
        raise EngineError(f"{model}: ONNX Runtime cannot load it: {_one_line(error)}") from error
    if session.get_providers()[0] != provider:  # ORT falls back to the CPU without an error
        raise EngineError(f"ONNX Runtime could not start {provider}; see its messages above")
    spec, max_batch = _input_spec(session, model)
    _check_outputs(session, model)
    manifest = {
        "backend": "onnxruntime",
        "version": ort.__version__,
        "provider": provider,
        "threads": threads,
        "model": model.name,
        "onnx_sha256": file_sha256(model),
        "input": {
            "name": spec.name,
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "scale": spec.scale,
        },
        "max_batch": max_batch,
    }
    return OnnxRuntimeEngine(spec, max_batch, manifest, session)


@dataclass(frozen=True)
class OnnxRuntimeEngine:
    """A model in ONNX Runtime; see `engine.protocol.Engine`. Made by `load`."""

    input_spec: InputSpec
    max_batch: int | None
    manifest: Mapping[str, object]
    _session: onnxruntime.InferenceSession = field(repr=False)

    def session(self) -> OnnxRuntimeSession:
        """Open a session; all sessions share the weights."""
        return OnnxRuntimeSession(self._session, self.input_spec, self.max_batch)


class OnnxRuntimeSession:
    """A stream of execution; see `engine.protocol.Session`."""

    def __init__(
        self, session: onnxruntime.InferenceSession, spec: InputSpec, fixed_batch: int | None
    ) -> None:
        self._session = session
        self._spec = spec
        self._fixed_batch = fixed_batch

    def infer(self, images: NDArray[np.generic]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Detect objects in a batch; see `engine.protocol.Session.infer`.

        Raises
        ------
        EngineError
            When the images' dtype, shape or number is not what the model takes, or the run fails.
        """
        count = self._check(images)
        if self._fixed_batch is not None and count < self._fixed_batch:
            padding = np.zeros((self._fixed_batch - count, *self._spec.shape), images.dtype)
            images = np.concatenate([images, padding])
        try:
            detections, num_detections = self._session.run(_OUTPUTS, {self._spec.name: images})
        except Exception as error:  # ORT's exceptions share no base class but Exception
            raise EngineError(f"ONNX Runtime failed: {_one_line(error)}") from error
        return detections[:count], num_detections[:count]

    def _check(self, images: NDArray[np.generic]) -> int:
        if images.dtype != self._spec.dtype:
            raise EngineError(f"images are {images.dtype}, the model takes {self._spec.dtype}")
        if images.ndim != 4 or images.shape[1:] != self._spec.shape or not len(images):
            raise EngineError(
                f"images have the shape {images.shape}, the model takes (N >= 1, "
                f"{', '.join(map(str, self._spec.shape))})"
            )
        if self._fixed_batch is not None and len(images) > self._fixed_batch:
            raise EngineError(
                f"a batch of {len(images)} images, but the model's batch is fixed at "
                f"{self._fixed_batch}"
            )
        return len(images)


def _input_spec(session: onnxruntime.InferenceSession, model: Path) -> tuple[InputSpec, int | None]:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(item.name for item in inputs)
        raise EngineError(f"{model}: one image input expected, found {len(inputs)}: {names}")
    image = inputs[0]
    dtype = _DTYPES.get(image.type)
    if dtype is None:
        raise EngineError(
            f"{model}: input {image.name!r} is {image.type}; float32 or int8 expected"
        )
    batch, *shape = image.shape
    if len(shape) != 3 or shape[0] != 3 or not all(isinstance(size, int) for size in shape):
        raise EngineError(
            f"{model}: input {image.name!r} has the shape {image.shape}; "
            "[N, 3, H, W] with fixed H and W expected"
        )
    scale = _input_scale(session, model) if dtype == "int8" else None
    spec = InputSpec(image.name, (shape[0], shape[1], shape[2]), dtype, scale)
    return spec, batch if isinstance(batch, int) else None


def _input_scale(session: onnxruntime.InferenceSession, model: Path) -> float:
    text = session.get_modelmeta().custom_metadata_map.get(INPUT_SCALE_KEY)
    if text is None:
        raise EngineError(
            f"{model}: an int8 input without the metadata {INPUT_SCALE_KEY!r}; "
            "quantise the model with 'engine quantize', which writes it"
        )
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise EngineError(
            f"{model}: metadata {INPUT_SCALE_KEY!r} is {text!r}; a positive number expected"
        )
    return scale


def _check_outputs(session: onnxruntime.InferenceSession, model: Path) -> None:
    found: dict[str, Any] = {item.name: item for item in session.get_outputs()}
    for name, kind, rank in (
        ("detections", "tensor(float)", 3),
        ("num_detections", "tensor(int32)", 1),
    ):
        if name not in found:
            raise EngineError(
                f"{model}: no output {name!r} (it has: {', '.join(found)}); "
                "export the model with 'export-onnx'"
            )
        if found[name].type != kind or len(found[name].shape) != rank:
            raise EngineError(
                f"{model}: output {name!r} is {found[name].type} {found[name].shape}; "
                f"{kind} with {rank} dimension(s) expected"
            )
    width = found["detections"].shape[2]
    if isinstance(width, int) and width != DETECTION_FIELDS:
        raise EngineError(
            f"{model}: rows of 'detections' have {width} columns; {DETECTION_FIELDS} expected"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Polygraphy runners of detectors: normalised images in, head tensors and detections out.

All runners take one float32 input, `IMAGES`, whatever the model's own input is called: the runner
of an INT8 model quantises the images itself. So any two runners can be fed the same data.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from engine.backends.onnxruntime.session import describe
from engine.data.preprocessed import quantize_images
from engine.errors import EngineError, one_line
from engine.load import load_engine
from engine.manifest import load_manifest
from engine.model import Detector, load_detector
from engine.protocol import DETECTIONS, NUM_DETECTIONS, Engine, InputSpec
from engine.quantization.network import open_session
from graph_surgery.errors import SurgeryError
from graph_surgery.inspect import read_tail

if TYPE_CHECKING:
    from engine.backends.cudnn.engine import CudnnEngine, CudnnSession

IMAGES = "images"
"""Input of every runner: float32 [N, 3, H, W], normalised."""

ROWS = (DETECTIONS, NUM_DETECTIONS)
"""Outputs of every runner, as `engine.protocol.Session.infer` returns them."""

Arrays = dict[str, NDArray[Any]]


class DetectorRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """What the runners of detectors share.

    Parameters
    ----------
    name
        Name in Polygraphy's results.
    spec
        The model's image input.
    """

    def __init__(self, name: str, spec: InputSpec) -> None:
        super().__init__(name=name)
        self.spec = spec

    def get_input_metadata_impl(self) -> TensorMetadata:
        """One input, `IMAGES`, with a dynamic batch."""
        return TensorMetadata().add(IMAGES, np.float32, (None, *self.spec.shape))

    def infer_impl(self, feed_dict: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Run on float32 images; outputs by name."""
        images = quantize_images(feed_dict[IMAGES], self.spec)
        start = time.perf_counter()
        outputs = self.detect(images)
        self.inference_time = time.perf_counter() - start
        return outputs

    def detect(self, images: NDArray[np.generic]) -> Arrays:
        """Run on images of the input's dtype; outputs by name, `ROWS` among them."""
        raise NotImplementedError


class EngineRunner(DetectorRunner):
    """Any engine of `engine.load`; its outputs are `ROWS`."""

    def __init__(self, name: str, engine: Engine) -> None:
        super().__init__(name, engine.input_spec)
        self._engine = engine

    def activate_impl(self) -> None:
        """Open a session."""
        self._session = self._engine.session()

    def detect(self, images: NDArray[np.generic]) -> Arrays:
        """Run on images of the input's dtype."""
        return dict(zip(ROWS, self._session.infer(images), strict=True))

    def deactivate_impl(self) -> None:
        """Close the session."""
        self._session.close()
        del self._session


class OnnxRunner(DetectorRunner):
    """An ONNX detector in ONNX Runtime on the CPU, with its head tensors.

    Outputs are ``loc_0``…, ``conf_0``…, then `ROWS`; float16 heads are returned as float32.

    Parameters
    ----------
    name
        Name in Polygraphy's results.
    detector
        The detector.
    heads
        Its head tensors by role, see `head_tensors`.
    """

    def __init__(self, name: str, detector: Detector, heads: Mapping[str, str]) -> None:
        super().__init__(name, detector.input)
        self._model = _with_outputs(detector.model, list(heads.values()))
        self._outputs = [*heads.values(), *ROWS]
        self._roles = [*heads, *ROWS]
        self._batch = detector.batch
        self._path = detector.path

    def activate_impl(self) -> None:
        """Load the model."""
        try:
            self._session = open_session(self._model)
        except EngineError as error:
            raise EngineError(f"{self._path}: {error}") from error

    def detect(self, images: NDArray[np.generic]) -> Arrays:
        """Run on images of the input's dtype."""
        count = len(images)
        if self._batch is not None:
            padding = [(0, self._batch - count), (0, 0), (0, 0), (0, 0)]
            images = np.pad(images, padding)
        try:
            values = self._session.run(self._outputs, {self.spec.name: images})
        except Exception as error:  # ORT's exceptions share no base class but Exception
            raise EngineError(f"ONNX Runtime failed: {one_line(error)}") from error
        outputs = {role: value[:count] for role, value in zip(self._roles, values, strict=True)}
        return {
            role: value.astype(np.float32) if value.dtype == np.float16 else value
            for role, value in outputs.items()
        }

    def deactivate_impl(self) -> None:
        """Drop the session."""
        del self._session


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes
    ----------
    runner
        Runs it.
    manifest
        What it is, as `engine.protocol.Engine.manifest`.
    quantized
        Whether any of it is INT8.
    """

    runner: DetectorRunner
    manifest: Mapping[str, object]
    quantized: bool


class CudnnRunner(EngineRunner):
    """An INT8 detector run by cuDNN, with its head tensors; outputs as those of `OnnxRunner`."""

    def __init__(self, name: str, engine: CudnnEngine, heads: Mapping[str, str]) -> None:
        super().__init__(name, engine)
        self._heads = heads
        self._session: CudnnSession

    def detect(self, images: NDArray[np.generic]) -> Arrays:
        """Run on images of the input's dtype."""
        rows = super().detect(images)
        values = self._session.heads(len(images))
        return {role: values[head] for role, head in self._heads.items()} | rows


def open_side(path: Path, name: str, backend: str = "onnxruntime") -> Side:
    """Open an ONNX file, or a built engine with the backend of its manifest.

    Parameters
    ----------
    path
        ``.onnx``, or an engine file with its manifest beside it.
    name
        Name in Polygraphy's results.
    backend
        What runs an ONNX file: ``onnxruntime`` on the CPU, or ``cudnn``.

    Raises
    ------
    EngineError
        When the file is no detector or its backend is missing.
    """
    if path.suffix != ".onnx":
        engine = load_engine(load_manifest(path).backend, path, device="cuda")
        runner: DetectorRunner = EngineRunner(name, engine)
        return Side(runner, engine.manifest, engine.input_spec.dtype == "int8")
    if backend == "cudnn":
        from engine.backends.cudnn.engine import load

        cudnn = load(path, max_batch=1)
        heads = head_tensors(load_detector(path).model)
        return Side(CudnnRunner(name, cudnn, heads), cudnn.manifest, quantized=True)
    detector = load_detector(path)
    try:
        heads = head_tensors(detector.model)
    except SurgeryError:  # a detector whose tail the surgery does not understand
        engine = load_engine("onnxruntime", path)
        return Side(EngineRunner(name, engine), engine.manifest, detector.quantized)
    manifest = describe(
        path,
        "cpu",
        None,
        detector.input,
        max_batch=detector.batch,
        keep_top_k=detector.keep_top_k,
    )
    return Side(OnnxRunner(name, detector, heads), manifest, detector.quantized)


def head_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Find the outputs of the head convolutions of a detector, before or after the surgery.

    Returns
    -------
    dict
        ``loc_0``…, ``conf_0``…, levels in the order of the priors, to the tensor's name.

    Raises
    ------
    SurgeryError
        When there is no detection tail that the surgery understands.
    """
    levels = read_tail(model)[0].heads.levels
    loc = {f"loc_{index}": level.loc for index, level in enumerate(levels)}
    return loc | {f"conf_{index}": level.conf for index, level in enumerate(levels)}


def _with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Copy of a model with further graph outputs."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    present = {output.name for output in marked.graph.output}
    # ONNX Runtime infers their types
    marked.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    return marked

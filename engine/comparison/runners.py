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
from engine.comparison.tensors import find_source
from engine.data.preprocessed import quantize_images
from engine.errors import EngineError, one_line
from engine.load import load_engine
from engine.manifest import load_manifest
from engine.model import Detector, load_detector
from engine.protocol import DETECTIONS, NUM_DETECTIONS, Engine, InputSpec
from engine.quantization.network import open_session

if TYPE_CHECKING:
    from engine.backends.cudnn.engine import CudnnEngine, CudnnSession
    from engine.backends.tensorrt.engine import Engine as TensorrtEngine
    from engine.backends.tensorrt.marked import MarkedPlan

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
    """An ONNX detector in ONNX Runtime on the CPU, with some of its tensors.

    Outputs are these, by role, then `ROWS`; float16 is returned as float32.

    Parameters
    ----------
    name
        Name in Polygraphy's results.
    detector
        The detector.
    tensors
        Role to the tensor's name, as `engine.comparison.tensors.head_tensors`.
    literally
        Without ONNX Runtime's graph optimisations, which round INT8 elsewhere than the file says.
    """

    def __init__(
        self, name: str, detector: Detector, tensors: Mapping[str, str], *, literally: bool = False
    ) -> None:
        super().__init__(name, detector.input)
        self._model = _with_outputs(detector.model, list(tensors.values()))
        self._outputs = [*tensors.values(), *ROWS]
        self._roles = [*tensors, *ROWS]
        self._literally = literally
        self._batch = detector.batch
        self._path = detector.path

    def activate_impl(self) -> None:
        """Load the model."""
        try:
            self._session = open_session(self._model, optimise=not self._literally)
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


class PlanRunner(EngineRunner):
    """A plan of TensorRT, with some tensors of its network; outputs as those of `OnnxRunner`.

    Rows are the plan's own; the tensors come from `engine.backends.tensorrt.marked.MarkedPlan`.
    """

    def __init__(
        self, name: str, engine: TensorrtEngine, marked: MarkedPlan, tensors: Mapping[str, str]
    ) -> None:
        super().__init__(name, engine)
        self._marked = marked
        self._tensors = tensors

    def detect(self, images: NDArray[np.generic]) -> Arrays:
        """Run on images of the input's dtype."""
        values = self._marked.run(images)
        shown = {role: values[name] for role, name in self._tensors.items()}
        return shown | super().detect(images)


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


@dataclass(frozen=True)
class Side:
    """One side of a comparison, before it is loaded.

    Attributes
    ----------
    path
        The file.
    name
        Name in Polygraphy's results.
    backend
        What runs it, one of `engine.load.BACKENDS`.
    detector
        The ONNX file: itself, or what an engine was built from; None: not found.
    """

    path: Path
    name: str
    backend: str
    detector: Detector | None

    @property
    def sha256(self) -> str | None:
        """Of the ONNX file."""
        return None if self.detector is None else self.detector.sha256

    @property
    def quantized(self) -> bool:
        """Whether any of it is known to be INT8."""
        return self.detector is not None and self.detector.quantized


@dataclass(frozen=True)
class Opened:
    """A side that runs: its runner, and what it is, as `engine.protocol.Engine.manifest`."""

    runner: DetectorRunner
    manifest: Mapping[str, object]


def find_side(
    path: Path, name: str, backend: str = "onnxruntime", source: Path | None = None
) -> Side:
    """Say what is to run a file.

    Parameters
    ----------
    path
        ``.onnx``, or an engine file with its manifest beside it.
    name
        Name in Polygraphy's results.
    backend
        What runs an ONNX file: ``onnxruntime`` on the CPU, or ``cudnn``.
    source
        The ONNX file that an engine was built from; see `engine.comparison.tensors.find_source`.

    Raises
    ------
    EngineError
        When the file is no detector.
    """
    if path.suffix == ".onnx":
        return Side(path, name, backend, load_detector(path))
    manifest = load_manifest(path)
    return Side(path, name, manifest.backend, find_source(path, manifest, source))


def open_side(side: Side, tensors: Mapping[str, str], *, literally: bool = False) -> Opened:
    """Load a side.

    Parameters
    ----------
    side
        Of `find_side`.
    tensors
        What it shows beside its detections, of its detector, by role.
    literally
        See `OnnxRunner`.

    Raises
    ------
    EngineError
        When its backend is missing or refuses it.
    """
    path, name, detector = side.path, side.name, side.detector
    if side.backend == "cudnn":
        from engine.backends.cudnn.engine import load

        cudnn = load(path, max_batch=1)
        return Opened(CudnnRunner(name, cudnn, tensors), cudnn.manifest)
    if side.backend != "onnxruntime" or detector is None or not tensors:
        engine = load_engine(side.backend, path)
        if not tensors or detector is None:
            return Opened(EngineRunner(name, engine), engine.manifest)
        from engine.backends.tensorrt.engine import Engine
        from engine.backends.tensorrt.marked import MarkedPlan

        if not isinstance(engine, Engine):
            raise TypeError(engine)
        marked = MarkedPlan(path, engine, detector, tuple(tensors.values()))
        return Opened(PlanRunner(name, engine, marked, tensors), engine.manifest)
    manifest = describe(
        path,
        "cpu",
        None,
        detector.input,
        max_batch=detector.batch,
        keep_top_k=detector.keep_top_k,
        first_label=detector.first_label,
        metadata=detector.metadata,
    )
    return Opened(OnnxRunner(name, detector, tensors, literally=literally), manifest)


def _with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Copy of a model with further graph outputs."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    present = {output.name for output in marked.graph.output}
    # ONNX Runtime infers their types
    marked.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    return marked

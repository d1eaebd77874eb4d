"""ONNX Runtime: the engine that runs everywhere, and the reference for the others."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.backends.blocking import BlockingSession
from engine.backends.cuda import gpu_index
from engine.backends.onnxruntime.session import (
    batch_check,
    describe,
    find_provider,
    input_spec,
    open_session,
)
from engine.errors import EngineError, one_line
from engine.protocol import DETECTION_FIELDS, DETECTIONS, NUM_DETECTIONS, TARGET_KEY, InputSpec

if TYPE_CHECKING:
    import onnxruntime

    from engine.backends.onnxruntime.cuda import SplitEngine

_LOG = logging.getLogger(__name__)

_TURNS = 5
"""Runs of which a layer's median counts, besides a first one that warms up."""

_NODE = "_kernel_time"
"""Ends the names of ONNX Runtime's profile that are of nodes."""


def load(
    model: Path, *, device: str = "cpu", threads: int | None = None
) -> OnnxRuntimeEngine | SplitEngine:
    """Load an ONNX detector whose outputs are ``detections`` and ``num_detections``.

    With ``cuda``, a graph that ends in NMS_OPT_TRT is split before that node, which libnms_opt.so
    takes over. Where that cannot be, ONNX Runtime runs the whole graph, and a warning says why.
    The manifest's ``nms`` tells which of them it is.

    Parameters
    ----------
    model
        ONNX file with one image input, float32 or int8 [N, 3, H, W], H and W fixed. An int8 input
        needs the metadata key `INPUT_SCALE_KEY`.
    device
        ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.
    threads
        Threads within one operator; None: one for each CPU the process may use.

    Raises
    ------
    EngineError
        When ONNX Runtime is missing, has no such device, or the model is not such a detector.
    """
    if gpu_index(device) is None:
        return load_whole(model, device=device, threads=threads)
    from engine.backends.onnxruntime.cuda import load_split
    from engine.backends.split import UnsplitError

    try:
        return load_split(model, device=device, threads=threads)
    except UnsplitError as reason:
        _LOG.warning(
            "%s: ONNX Runtime does the postprocessing, many small operators and some of them on "
            "the CPU, which is slow: %s",
            model,
            reason,
        )
    return load_whole(model, device=device, threads=threads)


def load_whole(
    model: Path, *, device: str = "cpu", threads: int | None = None
) -> OnnxRuntimeEngine:
    """Load a detector as `load` does; ONNX Runtime runs all of it.

    Raises
    ------
    EngineError
        As `load`.
    """
    provider = find_provider(model, device)
    index = gpu_index(device)
    options = {} if index is None else {"device_id": str(index)}
    session = open_session(model, model, provider, options, threads)
    spec, max_batch = input_spec(session, model)
    rows = _check_outputs(session, model)
    metadata = session.get_modelmeta().custom_metadata_map
    manifest = describe(
        model,
        device,
        threads,
        spec,
        max_batch=max_batch,
        keep_top_k=rows,
        first_label=_first_label(model),
        metadata=metadata,
    )
    if index is not None:
        manifest["nms"] = "ONNX Runtime"
    elif target := metadata.get(TARGET_KEY):
        manifest["target"] = target
    again = partial(open_session, model, model, provider, options, threads)
    return OnnxRuntimeEngine(spec, max_batch, manifest, session, again)


def _first_label(model: Path) -> int:
    """See `engine.model.Detector`; nobody asks Triton's process for it, which has no onnx."""
    try:
        from engine.model import load_detector
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        return 1
    return load_detector(model).first_label


@dataclass(frozen=True)
class OnnxRuntimeEngine:
    """A model in ONNX Runtime; see `engine.protocol.Engine`. Made by `load`."""

    input_spec: InputSpec
    max_batch: int | None
    manifest: Mapping[str, object]
    _session: onnxruntime.InferenceSession = field(repr=False)
    _open: Callable[..., onnxruntime.InferenceSession] = field(repr=False)

    def session(self) -> BlockingSession:
        """Open a session; all sessions share the weights."""
        spec, fixed = self.input_spec, self.max_batch

        def detect(
            images: NDArray[np.generic],
        ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
            count = len(images)
            if fixed is not None and count < fixed:
                padding = np.zeros((fixed - count, *spec.shape), images.dtype)
                images = np.concatenate([images, padding])
            try:
                detections, counts = self._session.run(
                    [DETECTIONS, NUM_DETECTIONS], {spec.name: images}
                )
            except Exception as error:  # ORT's exceptions share no base class but Exception
                raise EngineError(f"ONNX Runtime failed: {one_line(error)}") from error
            return detections[:count], counts[:count]

        return BlockingSession(batch_check(spec, fixed), detect)

    @property
    def tells_layers(self) -> bool:
        """Whether it runs on a CPU: of a GPU, ONNX Runtime tells when kernels start."""
        return self.manifest.get("device") == "cpu"

    def layer_times(self, batch: int) -> tuple[int, Mapping[str, float]]:
        """See `engine.protocol.TellsLayers`."""
        random = np.random.default_rng(0)
        shape = (self.max_batch or batch, *self.input_spec.shape)
        images = random.standard_normal(shape, np.float32)
        if self.input_spec.dtype == "int8":
            images = (40 * images).clip(-128, 127).astype(np.int8)
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(profile=Path(folder) / "nodes")
            try:
                for _ in range(1 + _TURNS):
                    session.run([DETECTIONS], {self.input_spec.name: images})
                events = json.loads(Path(session.end_profiling()).read_bytes())
            except Exception as error:  # ORT's exceptions share no base class but Exception
                raise EngineError(f"ONNX Runtime failed: {one_line(error)}") from error
        times: dict[str, list[float]] = {}
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith(_NODE):
                times.setdefault(event["name"].removesuffix(_NODE), []).append(event["dur"] / 1e3)
        found = {name: float(np.median(ms[1:])) for name, ms in times.items() if len(ms) > 1}
        return len(images), found

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate ordinary memory."""
        return np.empty(shape, dtype)


def _check_outputs(session: onnxruntime.InferenceSession, model: Path) -> int | None:
    """Check the outputs, and return the detections of an image where the model says them."""
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
    _, rows, width = found["detections"].shape
    if isinstance(width, int) and width != DETECTION_FIELDS:
        raise EngineError(
            f"{model}: rows of 'detections' have {width} columns; {DETECTION_FIELDS} expected"
        )
    return rows if isinstance(rows, int) else None

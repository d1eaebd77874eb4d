"""The layers of a plan: what TensorRT's engine inspector and its profiler say of them."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.backends.cuda import Stream, use_gpu
from engine.backends.tensorrt.engine import make_context, set_addresses, start
from engine.errors import EngineError
from engine.protocol import DETECTION_FIELDS, DETECTIONS, NUM_DETECTIONS

if TYPE_CHECKING:
    import tensorrt

    from engine.backends.tensorrt.engine import Engine

_TURNS = 30
"""Runs of which a layer's median counts; a tenth more warm up."""


@dataclass(frozen=True)
class PlanLayer:
    """A layer of a plan.

    Attributes
    ----------
    name
        TensorRT's: those of the ONNX nodes that it fused, joined by ``+``.
    kind
        As ``CaskConvolution``.
    tactic
        Name of its kernel; empty where TensorRT does not say.
    reads, writes
        Format and type of its first input and output.
    ms
        Median time of a batch, by TensorRT's profiler, which runs layer after layer.
    """

    name: str
    kind: str
    tactic: str
    reads: str
    writes: str
    ms: float


@dataclass(frozen=True)
class PlanDescription:
    """What a plan is made of.

    Attributes
    ----------
    layers
        In the order in which they run.
    session_bytes
        GPU memory of a session for what lies between layers.
    """

    layers: tuple[PlanLayer, ...]
    session_bytes: int


def describe_plan(engine: Engine, batch: int) -> PlanDescription:
    """Describe and time every layer of a plan, on noise.

    Parameters
    ----------
    engine
        Of `engine.backends.tensorrt.engine.load`.
    batch
        Images of a batch.

    Raises
    ------
    EngineError
        When TensorRT refuses the batch or fails.
    """
    spec, plan = engine.input_spec, engine.plan
    use_gpu(engine.device)
    _, rows, _ = plan.get_tensor_shape(DETECTIONS)
    with closing(Stream()) as stream:
        noise = _noise((batch, *spec.shape), spec.dtype)
        addresses = {
            spec.name: stream.device(noise.nbytes),
            DETECTIONS: stream.device(4 * batch * rows * DETECTION_FIELDS),
            NUM_DETECTIONS: stream.device(4 * batch),
        }
        stream.upload(addresses[spec.name], noise)
        memory = stream.device(plan.device_memory_size_v2)
        context: tensorrt.IExecutionContext = make_context(engine.trt, plan, memory, spec, batch)
        set_addresses(context, addresses)
        times = _profiler(engine.trt)
        for turn in range(_TURNS + _TURNS // 10):
            if turn == _TURNS // 10:
                context.profiler = times
            start(context, stream)
            stream.synchronize()
        found = _described(engine.trt, plan, context)
        del context  # before its memory
    layers = tuple(
        PlanLayer(
            name,
            str(layer.get("LayerType", "")),
            str(layer.get("TacticName", "")),
            _format(layer, "Inputs"),
            _format(layer, "Outputs"),
            float(np.median(times.ms[name])),
        )
        for name, layer in found.items()
        if name in times.ms
    )
    return PlanDescription(layers, int(plan.device_memory_size_v2))


def _described(
    trt: Any, plan: tensorrt.ICudaEngine, context: tensorrt.IExecutionContext
) -> dict[str, dict[str, Any]]:
    """What the inspector says of each layer, by name."""
    inspector: tensorrt.EngineInspector = plan.create_engine_inspector()
    inspector.execution_context = context
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    if not all(isinstance(layer, dict) for layer in layers):
        raise EngineError("the plan says no more of its layers than their names; build it again")
    return {layer["Name"]: layer for layer in layers}


def _format(layer: dict[str, Any], side: str) -> str:
    tensors = layer.get(side) or [{}]
    return str(tensors[0].get("Format/Datatype", ""))


def _profiler(trt: Any) -> Any:
    class Times(trt.IProfiler):  # type: ignore[misc]  # the module is chosen at run time
        """Keeps milliseconds by layer."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.ms: dict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms[layer_name].append(ms)

    return Times()


def _noise(shape: tuple[int, ...], dtype: str) -> Any:
    random = np.random.default_rng(0)
    if dtype == "int8":
        return random.integers(-60, 61, shape, np.int8)
    return random.standard_normal(shape, np.float32)

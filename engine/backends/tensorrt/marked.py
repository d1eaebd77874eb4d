"""A plan built once more that shows what lies between image and detections."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda import Stream, use_gpu
from engine.backends.tensorrt.build import plan_of
from engine.backends.tensorrt.engine import deserialize, make_context, set_addresses, start
from engine.backends.tensorrt.options import options_of
from engine.manifest import load_manifest

if TYPE_CHECKING:
    import tensorrt

    from engine.backends.tensorrt.engine import Engine
    from engine.model import Detector


class MarkedPlan:
    """The network of a plan with other outputs, built with the plan's options and timing cache.

    With heads as outputs, TensorRT fuses what it fuses in the plan itself. A tensor between two
    layers that it would have fused keeps them apart.

    Parameters
    ----------
    path
        The plan's file.
    engine
        It, loaded.
    detector
        The ONNX file that it was built from.
    tensors
        Names of float tensors of that file.

    Raises
    ------
    EngineError
        When it cannot be built.
    """

    def __init__(
        self, path: Path, engine: Engine, detector: Detector, tensors: Sequence[str]
    ) -> None:
        manifest = load_manifest(path)
        use_gpu(engine.device)
        self._engine = engine
        content = plan_of(
            engine.trt, detector, manifest.backend, options_of(path, manifest), tuple(tensors)
        )
        self._plan: tensorrt.ICudaEngine = deserialize(engine.trt, content, path, manifest)
        self._least = manifest.min_batch
        self._tensors = tuple(tensors)

    def run(self, images: NDArray[np.generic]) -> dict[str, NDArray[np.float32]]:
        """Run on a batch; float32 arrays by name.

        Parameters
        ----------
        images
            [N, 3, H, W] of the input's dtype.

        Raises
        ------
        EngineError
            When TensorRT fails.
        """
        engine, plan, spec = self._engine, self._plan, self._engine.input_spec
        use_gpu(engine.device)
        batch = max(len(images), self._least)
        with closing(Stream()) as stream:
            memory = stream.device(plan.device_memory_size_v2)
            context: tensorrt.IExecutionContext = make_context(
                engine.trt, plan, memory, spec, batch
            )
            source = np.zeros((batch, *spec.shape), spec.dtype)
            source[: len(images)] = images
            addresses = {spec.name: stream.device(source.nbytes)}
            stream.upload(addresses[spec.name], source)
            found = {}
            for name in self._tensors:
                dtype = engine.trt.nptype(plan.get_tensor_dtype(name))
                found[name] = np.empty(tuple(context.get_tensor_shape(name)), dtype)
                addresses[name] = stream.device(max(found[name].nbytes, 1))
            set_addresses(context, addresses)
            start(context, stream)
            for name, value in found.items():
                stream.download(value, addresses[name])
            stream.synchronize()
            del context  # before its memory
        return {name: value[: len(images)].astype(np.float32) for name, value in found.items()}

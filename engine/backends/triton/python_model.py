"""The model of Triton's Python backend that serves the engines of this project.

Triton's process for a model instance imports it: a repository's ``model.py`` is one line that
names `TritonPythonModel`. ``triton_python_backend_utils`` exists only in that process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.backends.onnxruntime.session import thread_count
from engine.errors import EngineError
from engine.load import load_engine

FILE_PARAMETER, BACKEND_PARAMETER = "model_file", "engine"
"""Parameters of the configuration: the model file beside ``model.py``, and what loads it."""


class TritonPythonModel:
    """One instance: a session of an engine; see Triton's documentation of the Python backend."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine: on the GPU of the instance, or on its share of the CPUs."""
        config = json.loads(args["model_config"])
        parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        model = Path(args["model_repository"], args["model_version"], parameters[FILE_PARAMETER])
        gpu = args["model_instance_kind"] == "GPU"
        instances = sum(int(group["count"]) for group in config.get("instance_group", ()))
        engine = load_engine(
            parameters[BACKEND_PARAMETER],
            model,
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            threads=None if gpu else max(1, thread_count(None) // max(1, instances)),
            max_batch=config["max_batch_size"],
        )
        self._session = engine.session()
        self._image = engine.input_spec.name

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run the requests that Triton has put together as one batch."""
        import triton_python_backend_utils as triton

        runs = [
            triton.get_input_tensor_by_name(request, self._image).as_numpy() for request in requests
        ]
        try:
            self._session.submit(runs)
            detections, counts = self._session.result()
        except EngineError as error:
            failed = triton.InferenceResponse(error=triton.TritonError(str(error)))
            return [failed] * len(requests)
        responses = []
        start = 0
        for run in runs:
            own = slice(start, start + len(run))
            outputs = [
                triton.Tensor("detections", detections[own]),
                triton.Tensor("num_detections", counts[own]),
            ]
            responses.append(triton.InferenceResponse(output_tensors=outputs))
            start = own.stop
        return responses

    def finalize(self) -> None:
        """Release the engine."""
        self._session.close()

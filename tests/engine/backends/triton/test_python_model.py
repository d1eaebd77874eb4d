"""What runs inside a Triton server."""

from __future__ import annotations

import json

from engine.backends.triton.python_model import TritonPythonModel


def test_a_configuration_that_names_no_instances(exported):
    """Triton then makes one."""
    config = {
        "parameters": {
            "model_file": {"string_value": exported.name},
            "engine": {"string_value": "onnxruntime"},
        },
        "max_batch_size": 2,
    }
    model = TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(exported.parent.parent),
            "model_version": exported.parent.name,
            "model_instance_kind": "CPU",
        }
    )
    model.finalize()

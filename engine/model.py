"""A detector in an ONNX file."""

from __future__ import annotations

from pathlib import Path

import onnx

from engine.errors import EngineError
from graph_surgery.errors import SurgeryError
from graph_surgery.files import load


def load_detector(model: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises
    ------
    EngineError
        When it is missing, damaged or invalid.
    """
    try:
        return load(model)
    except SurgeryError as error:
        raise EngineError(str(error)) from error

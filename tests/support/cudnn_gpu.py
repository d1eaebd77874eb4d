"""Whether the cuDNN engine can run here."""

from __future__ import annotations

from engine.backends.cudnn.engine import import_cudnn
from engine.errors import EngineError
from plugin_cuda.errors import PluginError
from plugin_cuda.int8_layers import load_layers_library


def cudnn_missing() -> str | None:
    """What keeps the GPU tests from running here."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return "needs cuda-bindings"
    error, count = runtime.cudaGetDeviceCount()
    if int(error) or not count:
        return "needs a GPU"
    try:
        import_cudnn()
        load_layers_library()
    except (EngineError, PluginError) as error:
        return str(error)
    return None

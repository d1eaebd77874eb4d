"""Choose a backend by name and load a model with it."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

from engine.errors import EngineError
from engine.protocol import Engine

_LOADERS = {
    "onnxruntime": "engine.backends.onnxruntime.engine:load",
    "cudnn": "engine.backends.cudnn.engine:load",
    "tensorrt": "engine.backends.tensorrt.engine:load_tensorrt",
    "tensorrt-rtx": "engine.backends.tensorrt.engine:load_tensorrt_rtx",
    "triton": "engine.backends.triton.engine:load",
}

BACKENDS = tuple(_LOADERS)
"""Names that `load_engine` knows."""

ONNX_BACKENDS = ("onnxruntime", "cudnn")
"""Those that load an ONNX file; the others load what ``engine build`` made of it."""


def load_engine(
    backend: str,
    model: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    max_batch: int | None = None,
) -> Engine:
    """Load a model with one of `BACKENDS`.

    Parameters
    ----------
    backend
        One of `BACKENDS`.
    model
        The model file: ONNX for ``onnxruntime`` and ``cudnn``, what the server serves for
        ``triton``, an engine file for the others.
    device
        ``cpu``, ``cuda`` or ``cuda:N``; None: ``cpu`` with ``onnxruntime``, the only one that
        takes it, else ``cuda``. For ``triton`` the server, ``HOST:PORT``.
    threads
        Threads that work on one batch; None: one for each CPU the process may use.
    max_batch
        Largest batch that will be asked for: ``cudnn`` prepares no larger one. None: not known. The
        others take what they take.

    Raises
    ------
    EngineError
        When the backend is unknown, not installed, or refuses the model or the device.
    """
    if backend not in _LOADERS:
        raise EngineError(f"unknown engine {backend!r}; choose one of: {', '.join(BACKENDS)}")
    device = device or ("cpu" if backend == "onnxruntime" else "cuda")
    given: dict[str, object] = {"device": device, "threads": threads}
    if backend == "cudnn":
        given["max_batch"] = max_batch
    engine: Engine = resolve_name(_LOADERS[backend])(model, **given)
    return engine

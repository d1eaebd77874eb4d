"""Choose a backend by name and load a model with it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from engine.protocol import Engine, EngineError

_MODULES = {"onnxruntime": "engine.backends.onnxruntime"}

BACKENDS = tuple(_MODULES)
"""Names that `load_engine` knows."""


def load_engine(
    backend: str, model: Path, *, device: str = "cpu", threads: int | None = None
) -> Engine:
    """Load a model with one of `BACKENDS`.

    Parameters
    ----------
    backend
        One of `BACKENDS`.
    model
        The model file.
    device
        ``cpu`` or ``cuda``.
    threads
        Threads that work on one batch; None: one for each CPU the process may use.

    Raises
    ------
    EngineError
        When the backend is unknown, not installed, or refuses the model or the device.
    """
    if backend not in _MODULES:
        raise EngineError(f"unknown engine {backend!r}; choose one of: {', '.join(BACKENDS)}")
    module = import_module(_MODULES[backend])
    engine: Engine = module.load(model, device=device, threads=threads)
    return engine

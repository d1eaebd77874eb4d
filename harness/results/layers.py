"""layers.json: how long each layer of an engine takes, where the engine tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.protocol import Engine, TellsLayers
from engine.support.documents import read_as
from engine.support.files import write_atomically
from harness.errors import HarnessError, as_harness_error

LAYERS = "layers.json"


@dataclass(frozen=True)
class Layers:
    """Times of the layers of an engine.

    Attributes
    ----------
    batch
        Images of the batch, which were noise.
    ms
        Median milliseconds of each layer, in the order in which they run.
    """

    batch: int
    ms: Mapping[str, float]

    def write(self, directory: Path) -> None:
        """Write the file into the folder of a run."""
        write_atomically(directory / LAYERS, (json.dumps(asdict(self)) + "\n").encode())


def measure_layers(engine: Engine, batch: int) -> Layers:
    """Ask an engine for the times of its layers.

    Raises
    ------
    HarnessError
        When it cannot tell them; see `check_layers`.
    EngineError
        When it fails.
    """
    return Layers(*check_layers(engine).layer_times(batch))


def check_layers(engine: Engine) -> TellsLayers:
    """Refuse an engine that cannot tell the times of its layers, before anything runs."""
    if isinstance(engine, TellsLayers) and engine.tells_layers:
        return engine
    what = f"{engine.manifest.get('backend')} on {engine.manifest.get('device')}"
    raise HarnessError(f"--layers: {what} does not tell the times of its layers")


def read_layers(directory: Path) -> Layers | None:
    """Read the file in the folder of a run; None where there is none.

    Raises
    ------
    HarnessError
        When it cannot be read or is none of ours.
    """
    path = directory / LAYERS
    if not path.exists():
        return None
    with as_harness_error():
        return read_as(Layers, path, "it is not a file of 'harness run'")

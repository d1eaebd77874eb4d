"""Weights from a file into a model: formats, checks, errors that name every finding."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from export.architecture import Architecture, Network
from export.architectures import by_name, by_weights
from export.config import Config
from export.errors import ExportError, needed_packages
from export.names import names_from_json
from export.unpickle import LEGACY_MAGIC, load_pickle
from export.weights import Weights, find_weights, shown
from graph_surgery.names import NAMES_KEY

_COMPARED = 20
"""Unexpected names of which the nearest is told: comparing one with all takes milliseconds."""

_LISTED = 500
"""Findings that a message lists, more than a model of another width has."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    Attributes
    ----------
    path, sha256
        The file and the SHA-256 of its bytes.
    architecture
        The detector that they are of.
    tensors
        Name in its network to tensor, not yet checked against one.
    config
        The configuration that the file itself states, if it does.
    names
        Class names that the file itself states; none: it does not.
    entry
        Keys that led to the weights, for people; empty: the file holds nothing else.
    """

    path: Path
    sha256: str
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    config: Config | None
    names: tuple[str, ...] = ()
    entry: str = ""


def read_checkpoint(path: Path, model: str | None = None) -> Checkpoint:
    """Read a .safetensors file or any ``torch.save`` file (by content, not by suffix).

    Nothing in the file is executed. A PyTorch file may hold a whole pickled module of any class
    path, or a state dict, alone or with what training scripts keep beside it; which entry holds
    the weights, and what wrappers put before their names, `export.weights` finds out. `model` is
    the name of the detector; without it, the file's configuration or its names tell.

    Raises
    ------
    ExportError
        Missing, truncated, unknown or unsafe file; a detector that there is not.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"{path}: cannot read the weights ({error.strerror})") from error
    metadata: Mapping[str, str] = {}
    if head.startswith((b"PK\x03\x04", LEGACY_MAGIC)):
        found: list[Weights] = []

        def choose(root: object) -> Mapping[str, object]:
            found.append(find_weights(root))
            return found[0].values

        tensors = load_pickle(path, choose)
        names, entry = found[0].names, found[0].said
    elif head[8:9] == b"{":
        tensors, metadata = _read_safetensors(path)
        names, entry = names_from_json(metadata.get(NAMES_KEY, "")), ""
    else:
        raise ExportError(
            f"{path}: unknown format; expected .safetensors or a file of torch.save "
            "(a whole module, or a state_dict, also under 'model' or 'state_dict')"
        )
    checked = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not checked:
        raise ExportError(f"{path}: not a state_dict: no tensor in it")
    architecture = by_name(model) if model else by_weights(checked, metadata)
    owned = {architecture.own_name(name): value for name, value in checked.items()}
    if len(owned) < len(checked):
        raise ExportError(f"{path}: a tensor stands there under two names")
    config, key = None, architecture.config_key
    try:
        config = architecture.config.from_json(metadata[key]) if metadata.get(key) else None
    except ExportError as error:
        raise ExportError(f"{path}: {key} in its metadata: {error}") from error
    return Checkpoint(path, digest, architecture, owned, config, names, entry)


def _read_safetensors(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    with needed_packages():
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # keys() is sorted by offset in the file, not by name
            tensors: dict[str, object] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ExportError(f"{path}: truncated or corrupt ({error})") from error
    return tensors, metadata


def infer_config(checkpoint: Checkpoint, image_shape: tuple[int, int] | None = None) -> Config:
    """Configuration of a checkpoint: what it states, else what its shapes tell.

    Widths and classes are read off the weights. The image's height and width cannot be; they are
    `image_shape`, else what the file states, else the MLPerf model's.

    Raises
    ------
    ExportError
        When no model can have that image.
    """
    config = checkpoint.config or checkpoint.architecture.config()
    if image_shape:
        config = config.resized(*image_shape)
    return config.inferred(checkpoint.tensors)  # what does not tell is listed by check_tensors


def check_tensors(checkpoint: Checkpoint, config: Config) -> None:
    """Compare names, shapes and values with a model of `config`.

    Raises
    ------
    ExportError
        One line per missing or unexpected name (with the nearest expected one), wrong shape or
        type, and tensor with NaN or infinite values.
    """
    with torch.device("meta"):
        state = checkpoint.architecture.network(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    missing = [n for n in expected if n not in found and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in found if n not in expected]
    problems = [f"missing {name} {list(expected[name])}" for name in missing]
    for number, name in enumerate(unexpected):
        problem = f"unexpected {shown(name)} {list(found[name])}"
        if number < _COMPARED:
            near = difflib.get_close_matches(name, missing or expected, n=1, cutoff=0.0)
            problem += f"; nearest expected: {near[0]}"
        problems.append(problem)
    problems += [
        f"wrong shape {name}: {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [
        f"not floating point {name}: {checkpoint.tensors[name].dtype}"
        for name in expected
        if name in found
        and not name.endswith("num_batches_tracked")
        and not checkpoint.tensors[name].is_floating_point()
    ]
    finite = {name: _finite(t) for name, t in checkpoint.tensors.items()}
    problems += [
        f"not finite {name}: {int((~known).sum())} of {known.numel()} values"
        for name, known in finite.items()
        if not known.all()
    ]
    if problems:
        raise ExportError(
            f"{checkpoint.path} does not fit {config} in {len(problems)} points:\n  "
            + "\n  ".join(problems[:_LISTED])
            + (f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else "")
        )


def _finite(tensor: Tensor) -> Tensor:
    """Which values are; those of less than 16 bits have no function for that."""
    small = tensor.is_floating_point() and tensor.itemsize < 2
    return (tensor.float() if small else tensor).isfinite()


def load_model(checkpoint: Checkpoint, config: Config) -> Network:
    """Build the model in eval mode with the checkpoint's weights as float32.

    Raises
    ------
    ExportError
        See `check_tensors`.
    """
    check_tensors(checkpoint, config)
    model = checkpoint.architecture.network(config)
    # num_batches_tracked only matters for training and old checkpoints lack it
    model.load_state_dict(dict(checkpoint.tensors), strict=False)
    return model.eval()

"""Weights from a file into a model: formats, checks, errors that name every finding."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from export.config import BOXES_PER_CELL, SSDConfig
from export.errors import ExportError, needed_packages
from export.model import SSDResNet34
from export.names import names_from_json
from export.unpickle import LEGACY_MAGIC, load_pickle
from export.weights import Weights, find_weights, shown
from graph_surgery.kinds import other_kind
from graph_surgery.names import NAMES_KEY

CONFIG_KEY = "ssd_config"
"""Metadata key of the configuration, in .safetensors checkpoints and in the ONNX file."""

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
    tensors
        Name to tensor, not yet checked against a model.
    config
        The configuration that the file itself states, if it does.
    names
        Class names that the file itself states; none: it does not.
    entry
        Keys that led to the weights, for people; empty: the file holds nothing else.
    keys
        These keys alone, dotted.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    config: SSDConfig | None
    names: tuple[str, ...] = ()
    entry: str = ""
    keys: str = ""


def read_checkpoint(path: Path, entry: str = "") -> Checkpoint:
    """Read a .safetensors file or any ``torch.save`` file (by content, not by suffix).

    Nothing in the file is executed. A PyTorch file may hold a whole pickled module of any class
    path, or a state dict, alone or with what training scripts keep beside it; which entry holds
    the weights, and what wrappers put before their names, `export.weights` finds out, unless
    `entry` names it.

    Raises
    ------
    ExportError
        Missing, truncated, unknown or unsafe file, or one without weights or without that entry.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"{path}: cannot read the weights ({error.strerror})") from error
    config = None
    if head.startswith((b"PK\x03\x04", LEGACY_MAGIC)):
        found: list[Weights] = []

        def choose(root: object) -> Mapping[str, object]:
            found.append(find_weights(root, entry))
            return found[0].values

        tensors = load_pickle(path, choose)
        names, said, keys = found[0].names, found[0].said, found[0].entry
    elif head[8:9] == b"{":
        if entry:
            raise ExportError(f"{path}: .safetensors has no entries; leave out --entry")
        tensors, config, names = _read_safetensors(path)
        said = keys = ""
    else:
        what = " but an ONNX model, which needs no export"
        if path.suffix != ".onnx":
            what = other_kind(path)
        known = what and not what.startswith(" but a checkpoint")  # of pickle alone, say
        raise ExportError(
            f"{path}: unknown format{f': no checkpoint{what}' if known else ''}; expected "
            ".safetensors or a file of torch.save "
            "(a whole module, or a state_dict, also under 'model' or 'state_dict')"
        )
    checked = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not checked:
        raise ExportError(f"{path}: no weights in it: needed are names with tensors")
    return Checkpoint(path, digest, checked, config, names, said, keys)


def _read_safetensors(
    path: Path,
) -> tuple[dict[str, object], SSDConfig | None, tuple[str, ...]]:
    with needed_packages():
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # keys() is sorted by offset in the file, not by name
            tensors: dict[str, object] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ExportError(f"{path}: truncated or corrupt ({error})") from error
    text = metadata.get(CONFIG_KEY)
    try:
        config = SSDConfig.from_json(text) if text else None
    except ExportError as error:
        raise ExportError(f"{path}: {CONFIG_KEY} in its metadata: {error}") from error
    return tensors, config, names_from_json(metadata.get(NAMES_KEY, ""))


def infer_config(checkpoint: Checkpoint, image_size: int | None = None) -> SSDConfig:
    """Configuration of a checkpoint: what it states, else what its shapes tell.

    Width and classes are read off the weights. The image size cannot be; it is `image_size`, else
    what the file states, else 1200.

    Raises
    ------
    ExportError
        When no model can have that image size.
    """
    stem = checkpoint.tensors.get("model.layer1.0.weight")
    conf = checkpoint.tensors.get("conf.0.bias")
    config = replace(
        checkpoint.config or SSDConfig(), **({"image_size": image_size} if image_size else {})
    )
    if stem is not None and stem.ndim == 4 and stem.shape[0] % 2 == 0:
        config = replace(config, width=stem.shape[0])
    if conf is not None and conf.ndim == 1 and conf.shape[0] >= 2 * BOXES_PER_CELL[0]:
        config = replace(config, num_classes=conf.shape[0] // BOXES_PER_CELL[0])
    return config  # what does not tell is listed by check_tensors


def check_tensors(checkpoint: Checkpoint, config: SSDConfig) -> None:
    """Compare names, shapes and values with a model of `config`.

    Raises
    ------
    ExportError
        One line per missing or unexpected name (with the nearest expected one), wrong shape or
        type, and tensor with NaN or infinite values.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in SSDResNet34(config).state_dict().items()}
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


def load_model(checkpoint: Checkpoint, config: SSDConfig) -> SSDResNet34:
    """Build the model in eval mode with the checkpoint's weights as float32.

    Raises
    ------
    ExportError
        See `check_tensors`.
    """
    check_tensors(checkpoint, config)
    model = SSDResNet34(config)
    # num_batches_tracked only matters for training and old checkpoints lack it
    model.load_state_dict(dict(checkpoint.tensors), strict=False)
    return model.eval()

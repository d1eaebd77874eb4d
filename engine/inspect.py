"""What a file is: a detector, a built engine or a calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backends.tensorrt.engine import load as load_plan
from engine.errors import EngineError
from engine.manifest import Manifest, check_engine, load_manifest, manifest_path
from engine.model import Detector, load_detector
from engine.quantization.cache import Calibration, parse_trt
from graph_surgery.errors import SurgeryError
from graph_surgery.inspect import read_tail
from graph_surgery.kinds import other_kind
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.protobuf import inputs, type_of

if TYPE_CHECKING:
    from engine.backends.tensorrt.layers import PlanDescription


def read_model(path: Path) -> Detector | Manifest:
    """Read an ONNX file, or the manifest of an engine.

    Raises
    ------
    EngineError
        When it is missing or damaged.
    """
    return load_detector(path) if path.suffix == ".onnx" else load_manifest(path)


def inspect_file(path: Path) -> Mapping[str, object]:
    """Describe a file in names and values.

    Parameters
    ----------
    path
        An ``.onnx`` file, an engine with its manifest beside it, or a calibration cache in JSON or
        in TensorRT's text format.

    Raises
    ------
    EngineError
        When it is none of these, or a damaged one.
    """
    if not path.is_file():
        raise EngineError(f"{path}: no such file")
    if path.suffix == ".onnx":
        return _detector(path)
    if manifest_path(path).exists():
        manifest = load_manifest(path)
        check_engine(path, manifest)
        return {"kind": "engine", **manifest.to_dict()}
    return _calibration(path)


def inspect_layers(
    paths: Sequence[Path], batch: int | None
) -> tuple[dict[str, PlanDescription], int] | str | None:
    """Describe and time the layers of plans.

    Parameters
    ----------
    paths
        Files of `inspect_file`.
    batch
        Images of the timed batch; None: the largest that is best for one of them and fits all.

    Returns
    -------
    layers
        By the name of the file, and the batch; a line where they cannot be seen here; None where
        no file is a plan.

    Raises
    ------
    EngineError
        When one is a plan and another is not, or they cannot run that batch.
    """
    plans = [path for path in paths if manifest_path(path).exists()]
    if not plans:
        return None
    if len(plans) < len(paths):
        raise EngineError("two files side by side: both must be plans")
    manifests = [load_manifest(path) for path in plans]
    most = min(one.max_batch for one in manifests)
    size = batch or min(most, max(one.opt_batch for one in manifests))
    try:
        engines = [load_plan(m.backend, p, "cuda") for m, p in zip(manifests, plans, strict=True)]
    except EngineError as error:
        return f"Layers are not shown: {error}"
    from engine.backends.tensorrt.layers import describe_plan

    names = [path.name for path in plans]
    if len(set(names)) < len(names):
        names = [str(path) for path in plans]
    return {n: describe_plan(e, size) for n, e in zip(names, engines, strict=True)}, size


def _detector(path: Path) -> dict[str, object]:
    detector = load_detector(path)
    model = detector.model
    kinds = Counter(node.op_type for node in model.graph.node)
    facts: dict[str, object] = {"kind": "ONNX detector", "sha256": detector.sha256}
    facts |= {f"input {value.name}": type_of(value) for value in inputs(model)}
    facts |= {f"output {value.name}": type_of(value) for value in model.graph.output}
    facts["opset"] = ", ".join(
        f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import
    )
    facts["nodes"] = f"{len(model.graph.node)}, of them {kinds['Conv']} Conv"
    pairs = kinds["DequantizeLinear"]
    facts["quantised"] = f"yes, {pairs} DequantizeLinear" if pairs else "no"
    try:
        tail, surgered = read_tail(model)
    except SurgeryError as error:
        facts["postprocessing"] = f"not understood: {error}"
    else:
        facts["postprocessing"] = OP_TYPE if surgered else "standard operators"
        for index, level in enumerate(tail.heads.levels):
            grid = f"{level.height} x {level.width}, {level.anchors} anchors"
            facts[f"level {index}"] = f"{grid}: {level.loc}, {level.conf}"
    return facts | {f"metadata {key}": value for key, value in detector.metadata.items()}


def _calibration(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if text.startswith("TRT-"):
        try:
            scales: Mapping[str, float] = parse_trt(text)
        except EngineError as error:
            raise EngineError(f"{path}, {error}") from error
        facts: dict[str, object] = {"kind": "calibration in TensorRT's text format"}
        facts["header"] = text.splitlines()[0]
    elif text.lstrip().startswith("{"):
        cache = Calibration.load(path)
        scales = cache.scales
        facts = {"kind": "calibration", **vars(cache)}
        for name in ("scales", "largest", "statistics"):
            del facts[name]
    else:
        if what := other_kind(path):
            raise EngineError(f"{path}: no model, engine or calibration{what}")
        raise EngineError(
            f"{path}: neither an .onnx file, nor an engine with its manifest "
            f"{manifest_path(path).name} beside it, nor a calibration cache"
        )
    return facts | {f"scale {name}": f"{scale:.6g}" for name, scale in scales.items()}

"""New weights for a plan that was built to take them, without building it again."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from engine.backends.cuda import use_gpu
from engine.backends.tensorrt.build import wanted_plugin
from engine.backends.tensorrt.engine import deserialize
from engine.backends.tensorrt.log import polygraphy_log
from engine.backends.tensorrt.module import import_tensorrt
from engine.backends.tensorrt.plugins import headers_version, load_plugins
from engine.errors import EngineError
from engine.manifest import (
    Machine,
    Manifest,
    check_engine,
    check_machine,
    check_plugins,
    load_manifest,
    manifest_path,
    plugin_library,
    same_engine,
    save_engine,
)
from engine.model import Detector
from engine.support.files import check_output
from graph_surgery.files import data_files
from graph_surgery.nms_function import plugin_only

if TYPE_CHECKING:
    import tensorrt


def refit(
    plan: Path, detector: Detector, output: Path, device: int = 0, *, overwrite: bool = False
) -> Manifest:
    """Put a detector's weights into a plan of the same network, and write it with its manifest.

    Parameters
    ----------
    plan
        Built with ``--refit`` or ``--strip-plan``, its manifest beside it. It is not changed.
    detector
        The network that it was built from, with other weights.
    output
        Plan to write: whole, and, where TensorRT can (10.16), refittable again. One that holds
        these weights already is left.
    device
        Number of the GPU.
    overwrite
        Whether another engine may be replaced.

    Raises
    ------
    EngineError
        When the plan takes no weights or cannot run here, the networks differ, a weight is missing
        or does not fit, TensorRT fails, or `output` is another file.
    """
    manifest = load_manifest(plan)
    content = check_engine(plan, manifest)
    if not (manifest.options.get("refit") or manifest.options.get("strip_plan")):
        raise EngineError(f"{plan}: was built without --refit or --strip-plan, so its weights stay")
    for file in (output, manifest_path(output)):
        check_output(file, [plan, detector.path, *data_files(detector.model)])
    wanted_plugin(detector)
    if not manifest.structure_sha256:
        raise EngineError(f"{plan}: its manifest, of an earlier release, knows no graph: build it")
    if detector.structure_sha256 != manifest.structure_sha256:
        raise EngineError(
            f"{detector.path}: its nodes or attributes are not those of {plan}: another network; "
            "build it"
        )
    trt = import_tensorrt(manifest.backend)
    gpu = use_gpu(device)
    here = Machine(manifest.backend, str(trt.__version__), gpu.name, gpu.compute_capability)
    check_machine(plan, manifest, here)
    libraries = check_plugins(plan, manifest)
    load_plugins(trt, libraries)
    again = hasattr(trt.SerializationFlag, "INCLUDE_REFIT")
    options = {k: v for k, v in manifest.options.items() if k not in ("strip_plan", "refit")}
    renewed = replace(
        manifest,
        model=detector.path.name,
        onnx_sha256=detector.sha256,
        plugins=tuple(plugin_library(output, one, headers_version(one)) for one in libraries),
        metadata=detector.metadata,
        input=detector.input,
        options=options | ({"refit": True} if again else {}),
    )
    if not overwrite and (found := same_engine(output, renewed)) is not None:
        return found
    start = time.monotonic()
    engine: tensorrt.ICudaEngine = deserialize(trt, content, plan, manifest)
    _refit(trt, engine, detector.path)
    config: tensorrt.ISerializationConfig = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)  # set where the plan was stripped
    if again:
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    whole = bytes(engine.serialize_with_config(config))
    renewed = replace(
        renewed,
        engine_sha256=hashlib.sha256(whole).hexdigest(),
        engine_bytes=len(whole),
        seconds=round(time.monotonic() - start, 3),
    )
    save_engine(output, whole, renewed)
    return renewed


def _refit(trt: Any, engine: tensorrt.ICudaEngine, path: Path) -> None:
    from polygraphy.backend.trt import get_trt_logger

    model = plugin_only(onnx.load(path, load_external_data=False)).SerializeToString()
    with polygraphy_log("warning") as errors:
        refitter: tensorrt.Refitter = trt.Refitter(engine, get_trt_logger())
        parser: tensorrt.OnnxParserRefitter = trt.OnnxParserRefitter(refitter, get_trt_logger())
        if not parser.refit_from_bytes(model, str(path)):
            raise EngineError(
                f"{path}: its weights do not fit the plan, which is of another network: "
                f"{errors.last('no cause')}"
            )
        if missing := refitter.get_missing_weights():
            raise EngineError(
                f"{path}: has no weights for {len(missing)} of the plan's, as {missing[0]}"
            )
        if not refitter.refit_cuda_engine():
            raise EngineError(f"{path}: TensorRT cannot refit it: {errors.first('no cause')}")

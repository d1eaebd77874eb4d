"""Build an engine from a detector's ONNX file, and write its manifest beside it."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from engine.backends.tensorrt.module import (
    BACKENDS,
    RTX,
    import_tensorrt,
    require_lean_runtime,
)
from engine.backends.tensorrt.options import BuildOptions, check_options, set_options
from engine.backends.tensorrt.plan import PlanRequest, build_plan
from engine.backends.tensorrt.plugins import headers_version, is_registered, load_plugins
from engine.errors import EngineError
from engine.manifest import (
    KEEP_TOP_K,
    Manifest,
    manifest_path,
    plugin_library,
    same_engine,
    save_engine,
)
from engine.model import Detector
from engine.protocol import InputSpec, output_shapes
from engine.support.files import another, check_output
from graph_surgery.errors import SurgeryError
from graph_surgery.files import data_files
from graph_surgery.graph import import_graph, output_names
from graph_surgery.nms_function import OP_TYPE
from graph_surgery.pattern import find_nms_node
from graph_surgery.protobuf import types

if TYPE_CHECKING:
    from engine.backends.cuda import Gpu

_MOST_VALUES = 2**31
"""Values that a tensor of TensorRT has fewer than, by what 10.6 says when it runs such a batch."""


def build(
    detector: Detector,
    backend: str,
    output: Path,
    options: BuildOptions,
    *,
    overwrite: bool = True,
) -> Manifest:
    """Build an engine file and the manifest beside it.

    Parameters
    ----------
    detector
        With an NMS_OPT_TRT node; strongly typed, with its Q/DQ nodes.
    backend
        ``tensorrt`` or ``tensorrt-rtx``. TensorRT builds on the GPU it builds for, TensorRT-RTX
        also without one.
    output
        Engine file to write.
    options
        How to build.
    overwrite
        Whether an engine or a manifest that is there may be replaced. If not, it is left where the
        manifest says what this one would.

    Raises
    ------
    EngineError
        When the backend is not installed or lacks an option, the model is no such detector, a
        plugin library is unusable, another file is there that may not be replaced, or the build
        fails.
    """
    if backend not in BACKENDS:
        raise EngineError(
            f"no engine can be built for {backend!r}; choose one of: {', '.join(BACKENDS)}"
        )
    check_options(backend, options)
    read = [detector.path, *data_files(detector.model), *options.plugins]
    read += [options.timing_cache] if options.timing_cache else []
    for file in (output, manifest_path(output), options.layer_info):
        if file is not None:
            check_output(file, read)
    from engine.backends.tensorrt.engine import write_layer_info

    image, rows = detector.input, wanted_plugin(detector).keep_top_k
    check_volumes(detector, options.max_batch)
    trt, gpu = _builder_of(backend, options)
    manifest = Manifest(
        backend=backend,
        version=str(trt.__version__),
        gpu=gpu.name if gpu else None,
        compute_capabilities=(gpu.compute_capability,) if gpu else options.compute_capabilities,
        model=detector.path.name,
        onnx_sha256=detector.sha256,
        plugins=tuple(
            plugin_library(output, library, headers_version(library)) for library in options.plugins
        ),
        metadata=detector.metadata,
        engine_sha256="",
        engine_bytes=0,
        input=image,
        min_batch=options.min_batch,
        opt_batch=options.best_batch,
        max_batch=options.max_batch,
        options=set_options(options),
        seconds=0.0,
        keep_top_k=rows,
        outputs=output_shapes(rows),
        first_label=detector.first_label,
        structure_sha256=detector.structure_sha256,
    )
    if not overwrite and options.layer_info is not None and options.layer_info.exists():
        raise another(options.layer_info)
    if not overwrite and (found := same_engine(output, manifest)) is not None:
        if options.layer_info is not None:
            write_layer_info(trt, output.read_bytes(), options.layer_info)
        return found
    start = time.monotonic()
    plan = plan_of(trt, detector, backend, options)
    seconds = time.monotonic() - start
    if options.layer_info is not None:
        write_layer_info(trt, plan, options.layer_info)
    manifest = replace(
        manifest,
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        engine_bytes=len(plan),
        seconds=round(seconds, 3),
    )
    save_engine(output, plan, manifest)
    return manifest


def plan_of(
    trt: Any,
    detector: Detector,
    backend: str,
    options: BuildOptions,
    outputs: tuple[str, ...] = (),
) -> bytes:
    """Build a plan.

    Parameters
    ----------
    trt
        The module that `engine.backends.tensorrt.module.import_tensorrt` returned.
    detector, backend, options
        As for `build`.
    outputs
        Tensors that it returns in place of the detections.

    Raises
    ------
    EngineError
        As `build`.
    """
    load_plugins(trt, options.plugins)
    _require_plugin(trt, detector, wanted_plugin(detector))
    if options.timing_cache is not None:
        try:
            options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"{options.timing_cache.parent}: cannot make the folder ({error.strerror})"
            ) from error
    request = PlanRequest(
        model=detector.path,
        input_name=detector.input.name,
        shapes=_shapes(detector.input, options),
        config=_config(trt, backend, options),
        memory_pools=options.memory_pools,
        tf32=options.tf32,
        timing_cache=options.timing_cache,
        verbosity=options.verbosity,
        outputs=outputs,
    )
    return build_plan(trt, backend, request)


def _builder_of(backend: str, options: BuildOptions) -> tuple[Any, Gpu | None]:
    """Import what builds, and choose its GPU."""
    trt = import_tensorrt(backend)
    gpu = None
    if backend != RTX or options.device is not None:
        from engine.backends.cuda import use_gpu

        gpu = use_gpu(options.device or 0)
    if options.version_compatible:
        require_lean_runtime(trt)
    return trt, gpu


@dataclass(frozen=True)
class Plugin:
    """What an NMS_OPT_TRT node asks TensorRT for, and the rows that it gives for each image."""

    version: str
    namespace: str
    keep_top_k: int


def wanted_plugin(detector: Detector) -> Plugin:
    """Make sure that a detector can be built, and find the plugin that it wants.

    Raises
    ------
    EngineError
        When it has no NMS_OPT_TRT node, other outputs than that node's, or not one image input with
        a dynamic batch.
    """
    path, model = detector.path, detector.model
    try:
        graph = import_graph(model)
    except SurgeryError as error:
        raise EngineError(f"{path}: {error}") from error
    node = find_nms_node(graph)
    if node is None:
        raise EngineError(f"{path}: no {OP_TYPE} node; run 'graph-surgery nms' on it first")
    made, outputs = output_names(node), [tensor.name for tensor in graph.outputs]
    if outputs != made:
        raise EngineError(
            f"{path}: outputs {', '.join(outputs)}; those of {OP_TYPE} ({', '.join(made)}) and no "
            "others expected"
        )
    detector.require_any_engine()
    detector.require_dynamic_batch()
    wanted = Plugin(
        node.attrs.get("plugin_version", "1"),
        node.attrs.get("plugin_namespace", ""),
        node.attrs.get("keepTopK", KEEP_TOP_K),
    )
    if tuple(map(type, vars(wanted).values())) != (str, str, int):
        raise EngineError(
            f"{path}: plugin_version, plugin_namespace and keepTopK of {OP_TYPE} are not text, "
            "text and a whole number"
        )
    return wanted


def _require_plugin(trt: Any, detector: Detector, plugin: Plugin) -> None:
    if not is_registered(trt, OP_TYPE, plugin.version, plugin.namespace):
        raise EngineError(
            f"{detector.path}: the plugin {OP_TYPE} (version {plugin.version}) is not registered; "
            "give the library that 'build-plugin' makes: --plugin libnmsoptplugin.so"
        )


def check_volumes(detector: Detector, max_batch: int) -> None:
    """Refuse a batch that TensorRT 10.6 builds a plan for, and then does not run.

    Raises
    ------
    EngineError
        When a tensor of so many images has 2^31 values or more.
    """
    sizes = {name: math.prod(_of_an_image(kind)) for name, kind in types(detector.model).items()}
    name = max(sizes, key=lambda name: sizes[name])
    limit = (_MOST_VALUES - 1) // sizes[name]
    if max_batch > limit:
        raise EngineError(
            f"{detector.path}: tensor {name!r} has {sizes[name]:,} values an image, and TensorRT "
            f"10.6 runs no tensor of 2^31: --max-batch {limit} at most"
        )


def _of_an_image(known: onnx.ValueInfoProto) -> list[int]:
    return [size.dim_value or 1 for size in known.type.tensor_type.shape.dim[1:]]


def _shapes(
    spec: InputSpec, options: BuildOptions
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return (
        (options.min_batch, *spec.shape),
        (options.best_batch, *spec.shape),
        (options.max_batch, *spec.shape),
    )


def _config(trt: Any, backend: str, options: BuildOptions) -> dict[str, Any]:
    """Translate options into arguments of Polygraphy's CreateConfig."""
    config: dict[str, Any] = {
        "refittable": options.refit,
        "strip_plan": options.strip_plan,
        "builder_optimization_level": options.optimization_level,
    }
    if backend == RTX:
        config["use_gpu"] = options.device is not None
        config["compute_capabilities"] = [_capability(trt, c) for c in options.compute_capabilities]
        return config
    config["version_compatible"] = options.version_compatible
    if options.hardware_compatible:
        config["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.timing_cache is not None:
        config["load_timing_cache"] = str(options.timing_cache)
    return config


def _capability(rtx: Any, text: str) -> tuple[int, int]:
    known = [name for name in rtx.ComputeCapability.__members__ if name.startswith("SM")]
    if f"SM{text.replace('.', '')}" not in known or text.count(".") != 1:
        names = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known)
        raise EngineError(f"TensorRT-RTX cannot build for {text!r}; choose from: {names}")
    major, minor = text.split(".")
    return int(major), int(minor)

"""ONNX file to TensorRT plan, through Polygraphy: one path for TensorRT 10, 11 and RTX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from engine.backends.tensorrt.log import ErrorLog, Verbosity, polygraphy_log
from engine.backends.tensorrt.module import RTX
from engine.backends.tensorrt.progress import build_progress
from engine.errors import EngineError
from graph_surgery.nms_function import plugin_only

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class PlanRequest:
    """What to build.

    Attributes
    ----------
    model
        ONNX file; its types are the precisions of the plan. The function that defines NMS_OPT_TRT
        is kept from the parser, so that the node can only be the plugin.
    input_name
        The input with the dynamic batch.
    shapes
        Its minimum, optimum and maximum shape.
    config
        Arguments of Polygraphy's CreateConfig; `memory_pools` come on top.
    memory_pools
        TensorRT's name of a memory pool, in lower case, to its limit in bytes.
    tf32
        Allow TF32 for float32 convolutions.
    timing_cache
        File that is read, when it exists, and extended.
    verbosity
        Least severe messages to show.
    outputs
        Tensors that the plan returns in place of the model's outputs.
    """

    model: Path
    input_name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    config: Mapping[str, Any]
    memory_pools: Mapping[str, int]
    tf32: bool
    timing_cache: Path | None
    verbosity: Verbosity
    outputs: tuple[str, ...] = ()


def build_plan(trt: Any, backend: str, request: PlanRequest) -> bytes:
    """Parse a model and build its plan.

    Parameters
    ----------
    trt
        The module that `import_tensorrt` returned for the backend.
    backend
        ``tensorrt`` or ``tensorrt-rtx``.
    request
        What to build.

    Raises
    ------
    EngineError
        When the parser or the builder refuses the model.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork, ModifyNetworkOutputs
    from polygraphy.exception import PolygraphyException

    arguments = dict(request.config)
    arguments["memory_pool_limits"] = _memory_pools(trt, request.memory_pools)
    with polygraphy_log(request.verbosity) as errors, build_progress(trt) as monitor:
        arguments["progress_monitor"] = monitor
        parsed = _parse(trt, backend, request.model, errors)
        builder, network, _ = parsed
        arguments["profiles"] = [_profile(request)]
        try:
            if request.outputs:
                parsed = ModifyNetworkOutputs(parsed, outputs=list(request.outputs))()
            config = _create_config(backend, arguments)(builder, network)
            _set_tf32(trt, config, request.tf32)
            plan = EngineBytesFromNetwork(
                parsed,
                config=lambda *_: config,
                save_timing_cache=request.timing_cache and str(request.timing_cache),
            )()
        except PolygraphyException as error:
            if getattr(monitor, "interrupted", False):
                raise KeyboardInterrupt from error
            cause = errors.first(error)
            raise EngineError(f"{request.model}: {backend} cannot build it: {cause}") from error
        return bytes(plan)


def _parse(
    trt: Any, backend: str, path: Path, errors: ErrorLog
) -> tuple[tensorrt.Builder, tensorrt.INetworkDefinition, tensorrt.OnnxParser]:
    from polygraphy.backend.trt import CreateNetwork, get_trt_logger
    from polygraphy.backend.trt.util import check_onnx_parser_errors
    from polygraphy.exception import PolygraphyException

    # the parser reads external weights itself, from beside the path
    content = plugin_only(onnx.load(path, load_external_data=False)).SerializeToString()
    try:
        builder, network = CreateNetwork(strongly_typed=True)()
        trt.init_libnvinfer_plugins(get_trt_logger(), "")
        parser: tensorrt.OnnxParser = trt.OnnxParser(network, get_trt_logger())
        check_onnx_parser_errors(parser, parser.parse(content, str(path)))
    except (PolygraphyException, TypeError) as error:  # TypeError: no builder without a GPU
        raise EngineError(f"{path}: {backend} cannot parse it: {errors.last(error)}") from error
    return builder, network, parser


def _memory_pools(trt: Any, limits: Mapping[str, int]) -> dict[Any, int]:
    pools = {name.lower(): pool for name, pool in trt.MemoryPoolType.__members__.items()}
    if unknown := [name for name in limits if name not in pools]:
        raise EngineError(
            f"no memory pool {unknown[0]!r} in this TensorRT; choose one of: "
            f"{', '.join(sorted(pools))}"
        )
    return {pools[name]: size for name, size in limits.items()}


def _profile(request: PlanRequest) -> Any:
    from polygraphy.backend.trt import Profile

    least, best, most = request.shapes
    return Profile().add(request.input_name, min=least, opt=best, max=most)


def _create_config(backend: str, arguments: Mapping[str, Any]) -> Any:
    if backend == RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX(**arguments)
    from polygraphy.backend.trt import CreateConfig

    return CreateConfig(**arguments)


def _set_tf32(trt: Any, config: tensorrt.IBuilderConfig, tf32: bool) -> None:
    """Set it either way: TensorRT's default is on, and Polygraphy knows it not for RTX."""
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)

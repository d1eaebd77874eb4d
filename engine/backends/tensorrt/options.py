"""How an engine is built: the options, which of them a backend has, and those of a built one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from engine.backends.tensorrt.log import Verbosity
from engine.backends.tensorrt.module import RTX
from engine.errors import EngineError
from engine.manifest import Manifest, check_plugins, manifest_path


@dataclass(frozen=True)
class BuildOptions:
    """How to build. Precision is no option: it is what the ONNX graph says.

    Attributes
    ----------
    min_batch, opt_batch, max_batch
        Optimisation profile of a dynamic batch; `opt_batch` None: the largest.
    memory_pools
        Memory pool, as ``workspace`` or ``tactic_shared_memory``, to its limit in bytes.
    timing_cache
        File that is read, when it exists, and extended. TensorRT only.
    optimization_level
        0 to 5: the time spent on searching; None: TensorRT's default.
    tf32
        Allow TF32 for what is float32 in the graph.
    version_compatible
        Also run on later releases of the same major version. TensorRT only, with its lean runtime.
    hardware_compatible
        Run on every GPU from Ampere on. TensorRT only.
    strip_plan
        Leave the weights out of the plan; it must be refitted before it runs. Needs a GPU.
    refit
        Keep the plan refittable. Needs a GPU.
    verbosity
        Least severe messages to show.
    layer_info
        File for the engine inspector's JSON; needs the GPU.
    plugins
        Plugin libraries to load first.
    compute_capabilities
        Targets of an ahead-of-time build, as ``8.9``; empty: the portable default. TensorRT-RTX
        only.
    device
        GPU to build on. None: the first one for TensorRT, none for TensorRT-RTX.

    Raises
    ------
    EngineError
        For a value out of range.
    """

    min_batch: int = 1
    opt_batch: int | None = None
    max_batch: int = 64
    memory_pools: Mapping[str, int] = field(default_factory=dict)
    timing_cache: Path | None = None
    optimization_level: int | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_plan: bool = False
    refit: bool = False
    verbosity: Verbosity = "warning"
    layer_info: Path | None = None
    plugins: tuple[Path, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    device: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.best_batch <= self.max_batch:
            raise EngineError(
                f"--min-batch {self.min_batch}, --opt-batch {self.best_batch}, --max-batch "
                f"{self.max_batch}: 1 <= min <= opt <= max expected"
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineError(f"--optimization-level {self.optimization_level}: 0 to 5 expected")
        if self.device is not None and self.compute_capabilities:
            raise EngineError("give --device or --compute-capability, not both")

    @property
    def best_batch(self) -> int:
        """`opt_batch`, or what stands for it."""
        return self.max_batch if self.opt_batch is None else self.opt_batch


_ONLY = {
    "timing_cache": "tensorrt",
    "version_compatible": "tensorrt",
    "hardware_compatible": "tensorrt",
    "compute_capabilities": RTX,
}
"""Options that only one backend has."""

_NEED_GPU = ("strip_plan", "refit", "layer_info")
"""Options that TensorRT-RTX cannot serve without a GPU."""

_IN_OTHER_LINES = {
    *("min_batch", "opt_batch", "max_batch", "plugins", "compute_capabilities"),
    *("verbosity", "layer_info"),
}
"""Options that have a line of their own in the manifest, or leave the engine as it is."""


def check_options(backend: str, options: BuildOptions) -> None:
    """Refuse an option that a backend lacks, or cannot serve without a GPU.

    Raises
    ------
    EngineError
        Names it.
    """
    for name, owner in _ONLY.items():
        if getattr(options, name) and backend != owner:
            instead = {
                "hardware_compatible": "; give --compute-capability instead",
                "compute_capabilities": "; it builds for the GPU it runs on",
            }.get(name, "")
            raise EngineError(f"{backend} has no option {_typed(name)}{instead}")
    if backend == RTX and options.device is None:
        for name in _NEED_GPU:
            if getattr(options, name):
                raise EngineError(
                    f"{backend} needs a GPU for the option {_typed(name)}; name it with --device"
                )


def _typed(name: str) -> str:
    """Return an option as the user types it."""
    return "--" + name.replace("_", "-").replace("capabilities", "capability")


def options_of(engine: Path, manifest: Manifest) -> BuildOptions:
    """Return the options with which an engine was built, to build the like.

    Raises
    ------
    EngineError
        When a plugin library is missing or another one, or an option is not known.
    """
    known = dict(manifest.options)
    if known.pop("strip_plan", False):  # of the file; it makes the plan refittable, too
        known["refit"] = True
    if cache := known.get("timing_cache"):
        known["timing_cache"] = Path(str(cache))
    try:
        return BuildOptions(
            min_batch=manifest.min_batch,
            opt_batch=manifest.opt_batch,
            max_batch=manifest.max_batch,
            plugins=check_plugins(engine, manifest),
            **known,  # type: ignore[arg-type]
        )
    except TypeError as error:
        raise EngineError(
            f"{manifest_path(engine)}: options of another release: {error}"
        ) from error


def set_options(options: BuildOptions) -> dict[str, object]:
    """Return the options that differ from their defaults and have no line of their own."""
    values: dict[str, object] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        if item.name not in _IN_OTHER_LINES and value not in (None, False, {}):
            values[item.name] = str(value) if isinstance(value, Path) else value
    return values

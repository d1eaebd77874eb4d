"""NMS_OPT_TRT from Python: libnms_opt.so on checked tensors of any array library.

    plan = prepare(loc, conf, priors, num_classes=81, background_class=0, top_k=200, ...)
    run = plan.bind(detections, num_detections, workspace)  # workspace: plan.workspace_bytes
    run(stream)

The caller owns all device memory; nothing here allocates any, waits for the device or keeps state,
so plans and runs may be used in any thread, and `run` may be captured in a CUDA graph. The device
of the tensors has to be the thread's current one when `run` is called.

Raw addresses work, too: `Plan` takes a `library.Config`, whose fields are those of nms_opt_config,
and the addresses of the heads, in any layout that nms_opt_format can say; `bind` takes a
`DeviceArray`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike

from plugin_cuda.device_array import DeviceArray, device_array, head_vector
from plugin_cuda.errors import PluginError
from plugin_cuda.library import (
    FLOAT16,
    FLOAT32,
    INT8,
    Config,
    Format,
    Level,
    check,
    load_library,
    workspace_size,
)

_DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "int8": INT8}


@dataclass(frozen=True)
class Run:
    """One ctypes call, its arguments made beforehand. Holds on to the tensors that it was given."""

    library: ctypes.CDLL
    arguments: tuple[object, ...]
    owners: tuple[object, ...] = field(repr=False)

    def __call__(self, stream: int) -> None:
        """Enqueue a run on a stream, given as its cudaStream_t.

        Raises
        ------
        PluginError
            When the library or CUDA refuses it.
        """
        status = self.library.nms_opt_run(*self.arguments, stream)
        if status:
            check(self.library, status)


@dataclass(frozen=True)
class Plan:
    """Heads and priors at fixed addresses.

    Attributes
    ----------
    config
        What to do.
    batch
        N, images.
    loc, conf
        Address of the head tensors of each level.
    priors
        Address of float32 [2, P * 4].
    device
        Number of the CUDA device that they lie on; None: not known.
    library
        From `load_library`.
    owners
        Whatever has to live as long as their memory.
    """

    config: Config
    batch: int
    loc: tuple[int, ...]
    conf: tuple[int, ...]
    priors: int
    library: ctypes.CDLL = field(default_factory=load_library)
    device: int | None = None
    owners: tuple[object, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        levels = len(self.config.levels)
        if len(self.loc) != levels or len(self.conf) != levels:
            raise PluginError(
                f"{levels} levels, but {len(self.loc)} loc and {len(self.conf)} conf tensors"
            )
        workspace_size(self.config, self.batch, self.library)  # refuses what cannot be run

    @property
    def workspace_bytes(self) -> int:
        """Bytes of device memory to give to `bind`."""
        return workspace_size(self.config, self.batch, self.library)

    def bind(self, detections: object, num_detections: object, workspace: object) -> Run:
        """Fix the outputs and the workspace.

        Parameters
        ----------
        detections
            float32 [N, keep_top_k, 7] on the device; every element is written by a run.
        num_detections
            int32 [N] on the device.
        workspace
            At least `workspace_bytes` on the device, of any type; of one run at a time.

        Raises
        ------
        PluginError
            For a tensor that is not so, by its name.
        """
        rows = device_array(detections, "detections")
        counts = device_array(num_detections, "num_detections")
        room = device_array(workspace, "workspace")
        _check_array(rows, "detections", np.float32, (self.batch, self.config.keep_top_k, 7))
        _check_array(counts, "num_detections", np.int32, (self.batch,))
        _check_array(room, "workspace", room.dtype, room.shape)
        if room.size < self.workspace_bytes:
            raise PluginError(f"workspace has {room.size} bytes, {self.workspace_bytes} are needed")
        named = {"detections": rows, "num_detections": counts, "workspace": room}
        _check_device(self.device, named)
        addresses = ctypes.c_void_p * len(self.loc)
        arguments = (
            ctypes.pointer(self.config.to_c()),
            self.batch,
            addresses(*self.loc),
            addresses(*self.conf),
            ctypes.c_void_p(self.priors),
            ctypes.c_void_p(rows.pointer),
            ctypes.c_void_p(counts.pointer),
            ctypes.c_void_p(room.pointer),
            ctypes.c_size_t(room.size),
        )
        return Run(self.library, arguments, (*self.owners, rows, counts, room))


def prepare(
    loc: Sequence[object],
    conf: Sequence[object],
    priors: object,
    *,
    num_classes: int,
    background_class: int,
    top_k: int,
    keep_top_k: int,
    confidence_threshold: float,
    nms_threshold: float,
    sigmoid: int = 0,
    level_top_k: int = 0,
    clip_before_nms: bool = False,
    bbox_xform_clip: float = 0.0,
    conf_scales: Sequence[float] | None = None,
    library: ctypes.CDLL | None = None,
) -> Plan:
    """Check head tensors and priors, and read from them the configuration of a run.

    Parameters
    ----------
    loc, conf
        Head tensors of each level on the device, float32 or float16 [N, A * 4, h, w] and float32,
        float16 or int8 [N, A * C, h, w]; NCHW, or NHWC by their strides (torch's channels_last),
        also with padded rows or as two slices of one tensor. See `device_array`.
    priors
        float32 [2, P * 4] or [2, P * 4, 1] on the device.
    conf_scales
        Real value of one step, for each level, of int8 conf.
    library
        From `load_library`; None: the one at `library_path`.
    num_classes, background_class, top_k, keep_top_k, confidence_threshold, nms_threshold, sigmoid
        As in nms_opt_config.
    level_top_k, clip_before_nms, bbox_xform_clip
        As there, too: of version 2 of NMS_OPT_TRT.

    Raises
    ------
    PluginError
        For a tensor of another type, shape, layout or device, by its name; for values that the
        library refuses, in its words.
    """
    if len(loc) != len(conf):
        raise PluginError(f"{len(loc)} loc tensors, but {len(conf)} conf tensors")
    named = {f"loc_{i}": device_array(tensor, f"loc_{i}") for i, tensor in enumerate(loc)}
    named |= {f"conf_{i}": device_array(tensor, f"conf_{i}") for i, tensor in enumerate(conf)}
    for name, array in named.items():
        if len(array.shape) != 4:
            raise PluginError(f"{name} has shape {list(array.shape)}, not [N, channels, h, w]")
    if not named:
        raise PluginError("NMS_OPT_TRT: no head tensors")
    arrays = list(named.values())
    locs, confs = arrays[: len(loc)], arrays[len(loc) :]
    batch = locs[0].shape[0]
    if (conf_scales is not None) != any(array.dtype == np.int8 for array in confs):
        raise PluginError("conf_scales are needed with int8 conf tensors, and only then")
    scales = [1.0] * len(confs) if conf_scales is None else conf_scales
    if len(scales) != len(confs):
        raise PluginError(f"{len(scales)} conf_scales, but {len(confs)} conf tensors")
    levels = tuple(
        _level(i, batch, num_classes, pair, scale)
        for i, (pair, scale) in enumerate(zip(zip(locs, confs, strict=True), scales, strict=True))
    )
    config = Config(
        num_classes=num_classes,
        background_class=background_class,
        top_k=top_k,
        keep_top_k=keep_top_k,
        confidence_threshold=confidence_threshold,
        nms_threshold=nms_threshold,
        levels=levels,
        sigmoid=sigmoid,
        level_top_k=level_top_k,
        clip_before_nms=int(clip_before_nms),
        bbox_xform_clip=bbox_xform_clip,
    )
    named["priors"] = prior = device_array(priors, "priors")
    shape = (2, config.num_priors * 4)
    _check_array(prior, "priors", np.float32, (*shape, 1) if len(prior.shape) == 3 else shape)
    return Plan(
        config,
        batch,
        tuple(array.pointer for array in locs),
        tuple(array.pointer for array in confs),
        prior.pointer,
        library or load_library(),
        _check_device(None, named),
        (*arrays, prior),
    )


def _level(
    index: int, batch: int, num_classes: int, heads: tuple[DeviceArray, DeviceArray], scale: float
) -> Level:
    """Check the two head tensors of a level."""
    loc, conf = heads
    height, width = loc.shape[2:]
    anchors = loc.shape[1] // 4
    for name, array, channels in (("loc", loc, 4), ("conf", conf, num_classes)):
        wanted = (batch, anchors * channels, height, width)
        if array.shape != wanted or not anchors:
            raise PluginError(
                f"{name}_{index} has shape {list(array.shape)}, not {list(wanted)}, "
                f"[N, anchors * {channels}, h, w] with N of loc_0 and the rest of loc_{index}"
            )
        allowed = ("float32", "float16", "int8")[: 2 + (name == "conf")]
        if array.dtype.name not in allowed or not array.dtype.isnative:
            raise PluginError(f"{name}_{index} is {array.dtype}, not one of {', '.join(allowed)}")
    forms = (
        Format(_DTYPES[loc.dtype.name], head_vector(loc, f"loc_{index}")),
        Format(_DTYPES[conf.dtype.name], head_vector(conf, f"conf_{index}"), scale),
    )
    return Level(height, width, anchors, *forms)


def _check_array(array: DeviceArray, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    """Check a tensor that has to be contiguous."""
    if array.dtype != dtype or array.shape != shape:
        raise PluginError(
            f"{name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}{list(shape)}"
        )
    if not array.is_contiguous:
        raise PluginError(f"{name} {list(shape)} is not contiguous")


def _check_device(device: int | None, named: dict[str, DeviceArray]) -> int | None:
    """Return the one device that the tensors lie on."""
    for name, array in named.items():
        if array.device is not None and device not in (None, array.device):
            raise PluginError(f"{name} is on CUDA device {array.device}, others on {device}")
        device = array.device if device is None else device
    return device

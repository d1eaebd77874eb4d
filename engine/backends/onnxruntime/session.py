"""Sessions of ONNX Runtime, and the batches they take: what the engines on CPU and GPU share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda import describe_gpu, gpu_index
from engine.errors import EngineError, one_line
from engine.protocol import InputSpec, check_batch, corrections_of, input_scale, output_shapes
from engine.support.external import model_sha256
from engine.support.processor import int8_instructions
from graph_surgery.kinds import other_kind

if TYPE_CHECKING:
    import onnxruntime

_OPERATOR = "NMS_OPT_TRT"  # graph_surgery knows it, too, but imports onnx, which servers lack
_DTYPES: dict[str, Literal["float32", "int8"]] = {
    "tensor(float)": "float32",
    "tensor(int8)": "int8",
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def find_provider(model: Path, device: str) -> str:
    """Look for the model file and for what runs it on a device.

    Returns
    -------
    provider
        ONNX Runtime's name of the execution provider.

    Raises
    ------
    EngineError
        When ONNX Runtime or the file is missing, or it has no such device.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EngineError(
            "the engine 'onnxruntime' needs ONNX Runtime: pip install onnxruntime"
        ) from error
    if not model.is_file():
        raise EngineError(f"{model}: no such model file")
    gpu = gpu_index(device)
    if device != "cpu" and gpu is None:
        raise EngineError(f"unknown device {device!r}; choose one of: cpu, cuda, cuda:N")
    provider = _PROVIDERS["cpu" if gpu is None else "cuda"]
    if provider not in ort.get_available_providers():
        raise EngineError(
            f"this ONNX Runtime {ort.__version__} has no {provider}; "
            "install onnxruntime-gpu for it or use --device cpu"
        )
    if gpu is not None:
        with redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # CUDA and cuDNN of NVIDIA's wheels
    return provider


def open_session(
    source: Path | bytes,
    model: Path,
    provider: str,
    options: Mapping[str, str],
    threads: int | None,
    *,
    entries: Mapping[str, str] = MappingProxyType({}),
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime.

    Parameters
    ----------
    source
        An ONNX file or its content.
    model
        The file to name in messages.
    provider, options
        Execution provider and what to tell it.
    threads
        As `engine.backends.onnxruntime.engine.load`.
    entries
        Session options that content needs, see `graph_surgery.protobuf.serialized`.
    profile
        How the name of a file begins into which the times of nodes are written; None: none is.

    Raises
    ------
    EngineError
        When ONNX Runtime refuses the model or cannot start the provider.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = thread_count(threads)
    settings.log_severity_level = 3
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    for key, value in {**exact_int8(), **entries}.items():
        settings.add_session_config_entry(key, value)
    content = source if isinstance(source, bytes) else str(source)
    try:
        session = ort.InferenceSession(
            content,
            settings,
            providers=[(provider, dict(options))],
            enable_fallback=0,  # to the CPU, when the provider fails
        )
    except Exception as error:  # ORT's exceptions share no base class but Exception
        if what := other_kind(model):
            raise EngineError(f"{model}: not an ONNX model{what}") from error
        raise EngineError(f"{model}: {refusal(error)}") from error
    if session.get_providers()[0] != provider:  # its library could not be loaded
        raise EngineError(f"ONNX Runtime could not start {provider}; see its messages above")
    return session


def exact_int8() -> dict[str, str]:
    """Settings of a session with which sums of INT8 products do not saturate.

    x86 processors without VNNI sum u8 by s8 products in 16 bits, unless they are told to take u8 by
    u8 (ONNX Runtime's list of session configuration keys). With VNNI that would take 1.7 times as
    long, and change nothing.
    """
    return {} if int8_instructions() else {"session.x64quantprecision": "1"}


def refusal(error: object) -> str:
    """Say why ONNX Runtime does not load a model, in one line."""
    text = one_line(error)
    if _OPERATOR in text and "is not a registered function/op" in text:
        text = (
            f"it lacks the definition of {_OPERATOR}, as files of 'graph-surgery nms "
            "--plugin-only' do, which are for TensorRT; give the file that has it"
        )
    return f"ONNX Runtime cannot load it: {text}"


def thread_count(threads: int | None) -> int:
    """Return the threads asked for, or one for each CPU that the process may use."""
    return threads or len(os.sched_getaffinity(0))


def describe(
    model: Path,
    device: str,
    threads: int | None,
    spec: InputSpec,
    *,
    max_batch: int | None,
    keep_top_k: int | None,
    first_label: int,
    metadata: Mapping[str, str],
) -> dict[str, object]:
    """Write the manifest of a loaded model; `keep_top_k` None: it does not say."""
    import onnxruntime as ort

    gpu = gpu_index(device)
    known: dict[str, object] = {}
    if gpu is not None:
        with suppress(EngineError):  # ONNX Runtime itself needs no CUDA bindings
            known["running_on"] = describe_gpu(gpu).identity
    return {
        **known,
        "backend": "onnxruntime",
        "version": ort.__version__,
        "provider": _PROVIDERS["cpu" if gpu is None else "cuda"],
        "device": device if gpu is None else f"cuda:{gpu}",
        "threads": thread_count(threads),
        "model": model.name,
        "onnx_sha256": model_sha256(model),
        "input": spec.to_dict(),
        "keep_top_k": keep_top_k,
        "outputs": output_shapes(keep_top_k),
        "first_label": first_label,
        "max_batch": max_batch,
        **corrections_of(metadata),
    }


def batch_check(
    spec: InputSpec, fixed_batch: int | None
) -> Callable[[Sequence[NDArray[np.generic]]], int]:
    """`engine.protocol.check_batch` for a model, whose batch may be fixed."""
    fixed = f"but the model's batch is fixed at {fixed_batch}"
    return partial(check_batch, spec=spec, max_batch=fixed_batch, taker="model", too_large=fixed)


def input_spec(session: onnxruntime.InferenceSession, model: Path) -> tuple[InputSpec, int | None]:
    """Read the image input of an open model, and its batch where that is fixed.

    Raises
    ------
    EngineError
        When it has no such input as `engine.backends.onnxruntime.engine.load` describes.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(item.name for item in inputs)
        raise EngineError(f"{model}: one image input expected, found {len(inputs)}: {names}")
    image = inputs[0]
    dtype = _DTYPES.get(image.type)
    if dtype is None:
        raise EngineError(
            f"{model}: input {image.name!r} is {image.type}; float32 or int8 expected"
        )
    batch, *shape = image.shape
    if len(shape) != 3 or shape[0] != 3 or not all(isinstance(size, int) for size in shape):
        raise EngineError(
            f"{model}: input {image.name!r} has the shape {image.shape}; "
            "[N, 3, H, W] with fixed H and W expected"
        )
    scale = None
    if dtype == "int8":
        scale = input_scale(session.get_modelmeta().custom_metadata_map, model)
    spec = InputSpec(image.name, (shape[0], shape[1], shape[2]), dtype, scale)
    return spec, batch if isinstance(batch, int) else None

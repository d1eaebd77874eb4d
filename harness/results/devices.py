"""The engines of a run: one for each GPU, or each Triton server, that the user names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from engine.auto import Way, choose
from engine.backends.cuda import describe_gpu, visible_gpus
from engine.errors import EngineError
from engine.load import load_engine
from engine.protocol import Engine
from graph_surgery.terminal import new_console
from harness.errors import HarnessError

ALL = "all"
"""Stands for every GPU that this process sees."""


def parse_devices(text: str) -> tuple[int, ...]:
    """Numbers of GPUs, as ``0,1``; for `ALL`, those that the driver tells.

    Raises
    ------
    HarnessError
        When it is no such list, names a GPU twice, or there is none.
    """
    if text.strip() == ALL:
        try:
            return visible_gpus()
        except EngineError as error:
            raise HarnessError(f"devices {ALL!r}: there is none here: {error}") from error
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise HarnessError(f"--devices {text!r}: numbers of GPUs expected, as 0 or 0,1, or {ALL}")
    numbers = tuple(map(int, words))
    if len(set(numbers)) < len(numbers):
        raise HarnessError(f"--devices {text!r} names a GPU twice; see --streams")
    return numbers


def parse_urls(text: str) -> tuple[str, ...]:
    """Triton servers, as ``host:8001,other:8001``.

    Raises
    ------
    HarnessError
        When it is no such list, or names a server twice.
    """
    urls = tuple(word.strip() for word in text.split(","))
    for url in urls:
        host, _, port = url.rpartition(":")
        if not host or not (port.isdecimal() and port.isascii()) or not 0 < int(port) < 65536:
            raise HarnessError(
                f"--url {text!r}: HOST:PORT of the gRPC endpoints of Triton servers expected, "
                "separated by commas"
            )
    if len(set(urls)) < len(urls):
        raise HarnessError(f"--url {text!r} names a server twice; see --streams")
    return urls


_LOG = logging.getLogger(__name__)

AUTO = "auto"
"""Name that stands for the fastest engine; see `fastest`."""


def fastest(
    model: Path, device: str | None, threads: int | None, batch: int, build_dir: Path
) -> Way:
    """Find the fastest engine for an ONNX file, and say what was measured.

    Parameters
    ----------
    model
        The ONNX file.
    device, threads
        See `engine.load.load_engine`.
    batch
        Images of a batch.
    build_dir
        Its folder ``engines`` has plans, and remembers.

    Raises
    ------
    EngineError
        When the file is no detector, or nothing runs it.
    """
    from engine.model import load_detector

    choice, remembered = choose(load_detector(model), batch, device, build_dir / "engines", threads)
    console = new_console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for one in choice.measured:
        speed = one.images_per_s
        found = f"cannot: {one.refusal}" if speed is None else f"{speed:.1f} images/s"
        console.print(f"engine auto: {one.way}: {found}")
    how = "as measured before" if remembered else "measured now, and remembered"
    console.print(f"engine auto: takes {choice.fastest}, batches of {batch}, {how}")
    return choice.fastest


def _check_one_model(devices: Sequence[int]) -> None:
    """Refuse GPUs that differ from the first: a result is of one model of GPU."""
    if len(devices) == 1:
        return
    first, *others = map(describe_gpu, devices)
    model = (first.name, first.compute_capability)
    different = [gpu for gpu in others if (gpu.name, gpu.compute_capability) != model]
    if different:
        raise HarnessError(
            f"GPUs of one model together: {first} is the first, but there is "
            f"{', '.join(map(str, different))}; leave it out of --devices"
        )


def load_engines(
    backend: str,
    model: Path,
    *,
    device: str | None,
    devices: Sequence[int] | None,
    threads: int | None,
    urls: Sequence[str] | None = None,
    max_batch: int | None = None,
) -> tuple[Engine, ...]:
    """Load a model on every device, or connect to every server.

    Parameters
    ----------
    backend, model, threads, max_batch
        See `engine.load.load_engine`.
    device
        See `engine.load.load_engine`; with `devices`, ``cuda`` or None.
    devices
        Numbers of GPUs; None: `device` alone.
    urls
        Triton servers, which only the backend ``triton`` takes, and which it needs. Devices and
        threads are then the servers' affair.

    Raises
    ------
    HarnessError
        When GPUs are numbered for another device than ``cuda`` or are not of one model, or the
        backend does not go together with devices, threads or servers.
    EngineError
        When an engine cannot be loaded.
    """
    names: list[str | None]
    if backend == "triton":
        if urls is None:
            raise HarnessError("the engine triton needs its servers: --url HOST:PORT[,HOST:PORT]")
        if (device, devices, threads) != (None, None, None):
            raise HarnessError("engine triton: devices and threads are the servers' affair")
        names = list(urls)
    elif urls is not None:
        raise HarnessError(f"--url names Triton servers, but the engine is {backend}")
    elif devices is None:
        names = [device]
    elif device in {None, "cuda"}:
        _check_one_model(devices)
        names = [f"cuda:{number}" for number in devices]
    else:
        raise HarnessError(f"--devices chooses GPUs, but the device is {device}")
    engines = tuple(
        load_engine(backend, model, device=name, threads=threads, max_batch=max_batch)
        for name in names
    )
    first = engines[0]
    on_cpu = first.manifest.get("provider") == "CPUExecutionProvider"
    if on_cpu and first.input_spec.dtype == "int8" and "target" not in first.manifest:
        _LOG.warning(
            "%s: this form of INT8 is slower than FP32 in ONNX Runtime on a CPU; the one that "
            "'engine quantize --target cpu' writes is faster",
            model,
        )
    return engines

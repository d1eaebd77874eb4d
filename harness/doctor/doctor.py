"""What this machine has and lacks for the project: ``harness doctor``."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from engine.support.environment import commit, cpu_count, cpu_name, distribution, output_of
from harness.benchmarks import DEFAULT
from harness.doctor.packages import PROJECT, Package, declared_packages
from harness.doctor.probes import Gpu
from harness.doctor.resources import Resources, find_resources
from harness.errors import HarnessError

_TIMEOUT_S = 60.0
"""For one probe; each takes a few seconds where nothing hangs."""

_MIB = 2**20
_SMI_QUERY = "driver_version,compute_cap,memory.total,name"
"""What nvidia-smi is asked for; memory in MiB, the name last, for it may hold commas."""

_ROOT = Path(__file__).parents[2]
"""The checkout, or where the wheel was installed."""

_INSTALL = "pip install -e ."
_EXTRA = "pip install 'ssd-resnet34-trt[{}]'"
_INSTALL_CUDA = (
    "pip uninstall --yes onnxruntime onnxruntime-gpu && "
    "pip install 'onnxruntime-gpu[cuda,cudnn]' cuda-bindings"
)
"""Both packages fill one folder: what is installed last has to be there alone."""

_INSTALL_TENSORRT = "pip install tensorrt cuda-bindings"

_PROBES = {
    "export": "export-onnx",
    "loadgen": "harness",
    "onnxruntime-cpu": "engine onnxruntime, cpu",
    "onnxruntime-cuda": "engine onnxruntime, cuda",
    "cudnn": "engine cudnn",
    "tensorrt": "engine tensorrt",
    "tensorrt-rtx": "engine tensorrt-rtx",
    "triton": "engine triton",
    "toolchain": "build-plugin",
    "kernels": "libnms_opt.so",
    "trt-plugin": "libnmsoptplugin.so",
}
"""Probes of `harness.doctor.probes`, and what the report calls them."""

_MODULES = {
    "export": "torch",
    "onnxruntime-cpu": "onnxruntime",
    "onnxruntime-cuda": "onnxruntime",
    "cudnn": "cudnn",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "triton": "tritonclient",
}
"""Without the module there is nothing to try."""

_GPU_ALONE = ("onnxruntime-cuda", "cudnn", "tensorrt")
"""Probes of what does nothing without a GPU."""


_FETCHED = {"coco": "data/coco/val2017", "openimages": "data/openimages/validation/data"}
"""Data sets, and what of them lies in the build folder once they are fetched."""


@dataclass(frozen=True)
class Ability:
    """Something that the project can do.

    Attributes
    ----------
    name
        The command, or the engine and its device.
    state
        ``partly``: `detail` says what does not work.
    detail
        Versions, or why it does not work.
    fix
        The command that makes it work; None: there is none for this machine, or no need.
    """

    name: str
    state: Literal["works", "partly", "no"]
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Gpus:
    """The GPUs of the machine.

    Attributes
    ----------
    driver, cuda
        Version of NVIDIA's driver, and the newest CUDA that it runs; None: unknown.
    devices
        In CUDA's order.
    source
        What told so, or why nothing did.
    """

    driver: str | None
    cuda: str | None
    devices: tuple[Gpu, ...]
    source: str


@dataclass(frozen=True)
class Report:
    """All that ``harness doctor`` says; `next_step` is one sentence."""

    project: dict[str, str | int | None]
    packages: dict[str, tuple[Package, ...]]
    gpus: Gpus
    abilities: tuple[Ability, ...]
    resources: Resources
    next_step: str


def examine(build_dir: Path) -> Report:
    """Look at this machine; whatever is missing is part of the report and raises nothing.

    Parameters
    ----------
    build_dir
        The build folder; it need not exist.
    """
    with ThreadPoolExecutor(cpu_count()) as pool:  # the slow ones first
        probes = {
            name: pool.submit(_probe, name, build_dir)
            for name in ("export", "gpus", *_PROBES)
            if _MODULES.get(name) is None or find_spec(_MODULES[name])
        }
        packages = declared_packages()
        resources = find_resources(build_dir)
        answers = {name: probe.result() for name, probe in probes.items()}
    gpus = _gpus(answers.pop("gpus"))
    abilities = (*_abilities(answers, bool(gpus.devices)), _triton_server(build_dir))
    return Report(
        project={
            "version": distribution(PROJECT)[1],
            "commit": commit(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "cpus": cpu_count(),
        },
        packages=packages,
        gpus=gpus,
        abilities=abilities,
        resources=resources,
        next_step=next(_steps(packages, gpus, abilities, resources)),
    )


def _abilities(answers: dict[str, dict[str, Any]], gpu: bool) -> tuple[Ability, ...]:
    """Turn the answers of the probes into what works, and what to do about the rest."""
    tools, plugin = answers["toolchain"], _EXTRA.format("plugin")
    build: str | None = "build-plugin"
    if "error" in tools:  # what pip cannot install, the message tells
        build = f"{plugin} && build-plugin" if plugin in tools["error"] else None
    fixes = {
        "export": _EXTRA.format("export"),
        "loadgen": _INSTALL,
        "onnxruntime-cpu": _INSTALL,
        "onnxruntime-cuda": _INSTALL_CUDA if gpu else None,
        "cudnn": _EXTRA.format("cudnn") if gpu else None,
        "tensorrt": _INSTALL_TENSORRT if gpu else None,
        "tensorrt-rtx": _EXTRA.format("rtx"),
        "triton": _EXTRA.format("triton"),
        "toolchain": plugin if build else None,
        "kernels": build,
        "trt-plugin": None if tools.get("limit") else build,
    }
    found = []
    for name, title in _PROBES.items():
        answer = answers.get(name) or {"error": f"{_MODULES[name]} is not installed"}
        if "error" in answer:
            why = str(answer["error"])
            if name in _GPU_ALONE and not gpu:
                why = f"no GPU; {why}"
            found.append(Ability(title, "no", why, fixes[name]))
        elif answer["limit"]:
            found.append(Ability(title, "partly", f"{answer['detail']}: {answer['limit']}"))
        else:
            found.append(Ability(title, "works", answer["detail"]))
    return tuple(found)


def _triton_server(build_dir: Path) -> Ability:
    """Look for a Triton server on this machine; others are reached by their address."""
    title = "Triton server"
    try:  # they need ONNX and more, which this report does not
        from harness.triton.repository import SERVER_BACKENDS
        from harness.triton.server import find_server, server_backends
    except ImportError as error:
        return Ability(title, "no", str(error), _INSTALL)
    try:
        command = find_server(build_dir)
        backends = server_backends(command)
    except (HarnessError, OSError) as error:
        return Ability(title, "no", str(error), "make triton_server")
    words = ", ".join(f"{name} {built}".strip() for name, built in backends.items())
    lacks = [name for name in SERVER_BACKENDS if name not in backends]
    detail = f"{command} with the backends: {words or 'none'}"
    if "tensorrt" in backends:
        detail += " (a plan runs with the very release that built it)"
    if not lacks:
        return Ability(title, "works", detail)
    limit = f"harness triton-repository --backend {'|'.join(lacks)} makes what it cannot serve"
    return Ability(title, "partly", f"{detail}; {limit}")


def _steps(
    packages: dict[str, tuple[Package, ...]],
    gpus: Gpus,
    abilities: tuple[Ability, ...],
    resources: Resources,
) -> Iterator[str]:
    """Yield what could be done next, what blocks most first."""
    state = {one.name: one for one in abilities}
    if not packages:
        yield f"Install the project: in its folder, {_INSTALL}"
    for one in packages.get("", ()):
        if not one.fits:
            yield f"Install {one.name}{one.required}: in the project's folder, {_INSTALL}"
    for title in ("harness", "engine onnxruntime, cpu"):
        if state[title].state == "no":
            yield f"Nothing runs without {title}: {state[title].detail}"
    if not resources.writable:
        yield f"Make {resources.folder} writable, or set BUILD_DIR to another folder"
    if state["export-onnx"].fix:
        yield f"To export models: {state['export-onnx'].fix}"
    if gpus.devices:
        yield from _gpu_steps(state)
    yield from _data_steps(resources)
    yield "Nothing is missing: see 'harness run --help'"


def _data_steps(resources: Resources) -> Iterator[str]:
    """Yield what is to be made in the build folder, or for which there is no room."""
    demo, *rest = (one for one in resources.balance if one.need.kind == "disk")
    fetched = [name for name, folder in _FETCHED.items() if Path(resources.folder, folder).is_dir()]
    if not demo.enough:
        yield f"Free some disk, or set BUILD_DIR to a larger one: no room for {demo.need.what}"
    shipped = (_ROOT / "demo").is_dir()  # but for a wheel
    if shipped and not list(Path(resources.folder).glob("onnx/*demo.nms.onnx")):
        yield f"Run the demo: make demo{'' if Path.cwd() == _ROOT else f', in {_ROOT}'}"
    for need in (one.need for one in rest if not one.enough and not one.need.optional):
        if need.dataset in (fetched or [DEFAULT.dataset]):
            yield f"Set BUILD_DIR to a larger disk: no room for {need.what}"
    if not fetched:
        yield (
            "Fetch COCO and the weights, or Open Images with --benchmark retinanet: "
            "harness download data && harness download model"
        )


def _gpu_steps(state: dict[str, Ability]) -> Iterator[str]:
    """Yield what to do when nothing runs on the GPU, or slowly."""
    cuda = state["engine onnxruntime, cuda"]
    others = (state["engine cudnn"], state["engine tensorrt"], state["engine tensorrt-rtx"])
    if cuda.state != "works" and all(one.state == "no" for one in others):
        yield f"To use the GPU: {cuda.fix}"
    if cuda.state == "works" and state["libnms_opt.so"].fix:
        yield f"For postprocessing on the GPU: {state['libnms_opt.so'].fix}"


def _gpus(answer: dict[str, Any]) -> Gpus:
    """Take the CUDA bindings' answer; without one, nvidia-smi's."""
    try:
        driver = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        driver = None
    if "error" not in answer:
        devices = tuple(Gpu(**one) for one in answer["devices"])
        return Gpus(driver or _smi()[0], answer["cuda"], devices, "cuda-bindings")
    found, devices = _smi()
    source = "nvidia-smi" if devices else "nvidia-smi lists none"
    return Gpus(driver or found, None, devices, f"{source}; {answer['error']}")


def _smi() -> tuple[str | None, tuple[Gpu, ...]]:
    """Version of the driver and the GPUs, as nvidia-smi lists them; none when it fails."""
    query = (f"--query-gpu={_SMI_QUERY}", "--format=csv,noheader,nounits")
    return parse_smi(output_of("nvidia-smi", *query) or "")


def parse_smi(text: str) -> tuple[str | None, tuple[Gpu, ...]]:
    """Read what nvidia-smi prints for a query of `_SMI_QUERY`; lines of another form are skipped.

    Returns
    -------
    driver, gpus
        Version of the driver, None without a GPU; the GPUs.
    """
    driver, gpus = None, []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.split(",", 3)]
        if len(row) == 4 and row[2].isascii() and row[2].isdigit():
            driver = row[0]
            gpus.append(Gpu(row[3], row[1], int(row[2]) * _MIB))
    return driver, tuple(gpus)


def _probe(name: str, build_dir: Path) -> dict[str, Any]:
    """Run one of `harness.doctor.probes`; the answer has ``error`` when it does not work."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "harness.doctor.probes", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIMEOUT_S,
            env={**os.environ, "BUILD_DIR": str(build_dir)},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_TIMEOUT_S:g} s"}
    except OSError as error:
        return {"error": f"cannot start {sys.executable}: {error.strerror}"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        answer = None
    if isinstance(answer, dict):
        return answer
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode < 0:
        last = f"its libraries ended the process ({signal.Signals(-done.returncode).name}): {last}"
    return {"error": last}

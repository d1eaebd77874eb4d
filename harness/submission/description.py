"""What a submission says about the machine: fields read from it, and those its owner fills in."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.protocol import CORRECTION_KEY, EQUALISED_KEY
from engine.support.documents import read_toml
from engine.support.environment import cpu_name
from harness.errors import HarnessError, as_harness_error
from harness.results.result import RunResult

SYSTEM_FIELDS = (
    "division",
    "submitter",
    "status",
    "system_type",
    "system_name",
    "number_of_nodes",
    "host_processor_model_name",
    "host_processors_per_node",
    "host_processor_core_count",
    "host_processor_frequency",
    "host_processor_caches",
    "host_processor_interconnect",
    "host_memory_capacity",
    "host_memory_configuration",
    "host_storage_capacity",
    "host_storage_type",
    "host_networking",
    "host_networking_topology",
    "accelerators_per_node",
    "accelerator_model_name",
    "accelerator_memory_capacity",
    "accelerator_memory_configuration",
    "accelerator_frequency",
    "accelerator_host_interconnect",
    "accelerator_interconnect",
    "accelerator_interconnect_topology",
    "accelerator_on-chip_memories",
    "framework",
    "operating_system",
    "other_software_stack",
    "cooling",
    "hw_notes",
    "sw_notes",
)
"""Fields of systems/<system>.json; MLPerf Inference v2.0, tools/submission/submission-checker.py"""

MEASUREMENT_FIELDS = (
    "input_data_types",
    "retraining",
    "starting_weights_filename",
    "weight_data_types",
    "weight_transformations",
)
"""Fields of measurements/.../<system>_<implementation>_<scenario>.json; the same source."""

CALIBRATION = "calibration"
"""Key in the measurements table for the text of the calibration note."""

MAY_BE_EMPTY = ("hw_notes", "sw_notes")
STATUSES = ("available", "preview", "rdi")
SYSTEM_TYPES = ("datacenter", "edge", "datacenter,edge", "edge,datacenter")

GIVEN_ELSEWHERE = ("division", "submitter")
_NO_ACCELERATOR = "N/A"


@dataclass(frozen=True)
class Description:
    """Content of the owner's TOML file.

    Attributes
    ----------
    system
        Values of `SYSTEM_FIELDS`.
    measurements
        Values of `MEASUREMENT_FIELDS` and `CALIBRATION`.
    """

    system: Mapping[str, str | int] = field(default_factory=dict)
    measurements: Mapping[str, str] = field(default_factory=dict)


def load_description(path: Path | None) -> Description:
    """Read the TOML file: system fields on the top level, measurement fields in [measurements].

    Raises
    ------
    HarnessError
        Unreadable file, unknown field, or a value that is neither text nor a whole number.
    """
    if path is None:
        return Description()
    with as_harness_error():
        content = read_toml(path)
    measurements = content.pop("measurements", {})
    if not isinstance(measurements, dict):
        raise HarnessError(f"{path}: measurements is no table; write [measurements]")
    known_system = [name for name in SYSTEM_FIELDS if name not in GIVEN_ELSEWHERE]
    known_measurements = (*MEASUREMENT_FIELDS, CALIBRATION)
    for values, known, where in (
        (content, known_system, "the top level"),
        (measurements, known_measurements, "[measurements]"),
    ):
        for key, value in values.items():
            if key not in known:
                raise HarnessError(
                    f"{path}: {where} has no field {key!r}; it has: {', '.join(known)}"
                )
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise HarnessError(f"{path}: {key} is {value!r}; a text or whole number expected")
    for key, valid in (("status", STATUSES), ("system_type", SYSTEM_TYPES)):
        if key in content and content[key] not in valid:
            raise HarnessError(f"{path}: {key} is {content[key]!r}; choose of: {', '.join(valid)}")
    return Description(content, {key: str(value) for key, value in measurements.items()})


def system_json(
    description: Description, result: RunResult, *, name: str, submitter: str, division: str
) -> dict[str, str | int]:
    """Content of systems/<system>.json; what nobody knows is an empty text.

    Parameters
    ----------
    description
        The owner's words, above everything read from the run or the machine.
    result
        A run on the system.
    name, submitter, division
        Of the system and the submission.
    """
    versions = result.versions
    known: dict[str, str | int] = {
        "system_name": name,
        "number_of_nodes": 1,
        "host_processor_model_name": versions.get("cpu", ""),
        "framework": _framework(result.engine),
        "operating_system": versions.get("platform", ""),
        "other_software_stack": (
            f"Python {versions.get('python')}, NumPy {versions.get('numpy')}, "
            f"LoadGen {versions.get('loadgen')}"
        ),
    }
    if (versions.get("cpu"), versions.get("platform")) == (cpu_name(), platform.platform()):
        known |= _this_machine()
    known |= _accelerator(result.engine)
    values = {**known, **description.system, "submitter": submitter, "division": division}
    return {key: values.get(key, "") for key in SYSTEM_FIELDS}


def measurement_json(description: Description, result: RunResult) -> dict[str, str]:
    """Content of the measurement file of a run."""
    known = {"input_data_types": input_dtype(result.engine)}
    values = {**known, **description.measurements}
    return {key: values.get(key, "") for key in MEASUREMENT_FIELDS}


def input_dtype(engine: Mapping[str, object]) -> str:
    """MLPerf's name of the engine's input type; empty if its manifest does not tell."""
    spec = engine.get("input")
    dtype = str(spec.get("dtype", "")) if isinstance(spec, Mapping) else ""
    return {"float32": "fp32", "float16": "fp16"}.get(dtype, dtype)


def corrections(engine: Mapping[str, object]) -> str:
    """A paragraph on what else the calibration images shaped; empty if its manifest says nothing.

    A plan's manifest has it among the metadata of its ONNX file.
    """
    metadata = engine.get("metadata")
    known = {**metadata, **engine} if isinstance(metadata, Mapping) else engine
    text = ""
    if EQUALISED_KEY in known:
        text += (
            "Before calibration the channels between convolutions were equalised by factors that "
            "leave the float network's answers as they are, from the ranges of activations on the "
            "calibration images alone.\n\n"
        )
    if known.get(CORRECTION_KEY) == "bias":
        text += (
            "Of every quantised convolution's bias, the mean difference per output channel between "
            "its output in INT8 and in float, on the calibration images alone, was taken off (bias "
            "correction, M. Nagel et al., 2019).\n\n"
        )
    return text


def _framework(engine: Mapping[str, object]) -> str:
    names = {
        "onnxruntime": "ONNX Runtime",
        "cudnn": "cuDNN",
        "tensorrt": "TensorRT",
        "tensorrt-rtx": "TensorRT-RTX",
    }
    backend = str(engine.get("backend", ""))
    return f"{names.get(backend, backend)} {engine.get('version', '')}".strip()


def _accelerator(engine: Mapping[str, object]) -> dict[str, str | int]:
    if engine.get("provider") == "CPUExecutionProvider":
        fields = [name for name in SYSTEM_FIELDS if name.startswith("accelerator")]
        return {**dict.fromkeys(fields, _NO_ACCELERATOR), "accelerators_per_node": 0}
    gpu, gpus = engine.get("gpu"), engine.get("gpus")
    known: dict[str, str | int] = {"accelerator_model_name": str(gpu)} if gpu else {}
    return {**known, "accelerators_per_node": len(gpus)} if isinstance(gpus, list) else known


def _this_machine() -> dict[str, str | int]:
    """What Linux tells of processors and memory."""
    known: dict[str, str | int] = {}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known["host_memory_capacity"] = f"{pages / 2**30:.0f} GiB"
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return known
    sockets = set(re.findall(r"^physical id\s*: (\d+)$", text, re.MULTILINE))
    cores = re.search(r"^cpu cores\s*: (\d+)$", text, re.MULTILINE)
    if sockets and cores:
        known["host_processors_per_node"] = len(sockets)
        known["host_processor_core_count"] = int(cores[1])
    caches = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (cache / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        caches.append(f"L{level}{suffix} {size}iB" if size.endswith("K") else f"L{level} {size}")
    if caches:
        known["host_processor_caches"] = ", ".join(caches)
    return known

"""A model repository for Triton Inference Server, made from a model file.

The configuration is Triton's own protobuf message, written in its text format; see
https://docs.nvidia.com/deeplearning/triton-inference-server/ (Model Configuration).
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from engine.backends.triton.config import DTYPES, KNOWN_PARAMETER, MODEL_NAME
from engine.backends.triton.engine import import_client
from engine.backends.triton.known import KnownAnswers, find_known
from engine.backends.triton.python_model import BACKEND_PARAMETER, FILE_PARAMETER
from engine.backends.triton.served import ServedModel, served_model
from engine.errors import EngineError
from engine.load import ONNX_BACKENDS, load_engine
from engine.manifest import check_engine, check_plugins, save_engine
from engine.protocol import DETECTION_FIELDS, DETECTIONS, NUM_DETECTIONS
from engine.support.external import data_files, model_sha256
from engine.support.files import whole_folder, write_atomically
from engine.support.progress import progress_bar
from harness.errors import HarnessError
from harness.loadgen.settings import DEFAULT_BATCH, SCENARIOS, MultiStream

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

ServerBackend = Literal["tensorrt", "onnxruntime", "python"]
SERVER_BACKENDS: tuple[ServerBackend, ...] = get_args(ServerBackend)

_VERSION = "1"
_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "python": "model.py"}
_PYTHON_MODEL = "from engine.backends.triton.python_model import TritonPythonModel  # noqa: F401\n"

_QUEUE_DELAY_US = {"Offline": 10_000, "Server": 1_000, "MultiStream": 0}
"""Microseconds that a request waits at most for others to share its batch with.

The harness sends whole batches, so Triton only joins those of several clients or sessions. Server's
is NVIDIA's of MLPerf Inference v2.0 (A30x8_TRT_Triton); the others are ours.
"""


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model repository.

    Attributes
    ----------
    path
        Its folder.
    server_arguments
        What `tritonserver` needs to be told to serve it.
    """

    path: Path
    server_arguments: tuple[str, ...]


def write_repository(
    model: Path,
    output: Path,
    backend: str,
    *,
    engine: str | None = None,
    max_batch: int | None = None,
    instances: int = 1,
    gpus: Sequence[int] = (),
    graphs: bool = False,
    reference: Path | None = None,
) -> Repository:
    """Write a repository that a stock server loads; it is complete or not there.

    Parameters
    ----------
    model
        ONNX detector or built engine; copied.
    output
        Folder to make.
    backend
        One of `SERVER_BACKENDS`: ``tensorrt`` takes a TensorRT engine, ``onnxruntime`` an ONNX
        file, ``python`` either, which an engine of this project then runs.
    engine
        That engine for an ONNX file, one of `engine.load.ONNX_BACKENDS`; None: ``onnxruntime``.
    max_batch
        Largest batch; None: the engine's, or `harness.loadgen.settings.DEFAULT_BATCH` for an ONNX
        file.
    instances
        Instances of the model on each GPU, or on the CPU.
    gpus
        Numbers of the GPUs, as the server sees them; none: all of them.
    graphs
        Have Triton's TensorRT backend use CUDA graphs.
    reference
        The ONNX file of the model, by which ONNX Runtime finds the known answers; None: the engine
        that will serve it finds them, here.

    Raises
    ------
    HarnessError
        When `output` exists or cannot be written.
    EngineError
        When the client library is missing, the model cannot be read, the backend cannot serve it
        like this, or no known answers are found.
    """
    if output.exists():
        raise HarnessError(f"{output} exists; choose another folder or remove it")
    if backend not in SERVER_BACKENDS:
        raise HarnessError(
            f"unknown backend {backend!r}; choose one of: {', '.join(SERVER_BACKENDS)}"
        )
    import_client()
    from google.protobuf import text_format  # type: ignore[import-untyped]

    served = served_model(model)
    if engine is not None:
        if backend != "python" or served.manifest is not None or engine not in ONNX_BACKENDS:
            raise EngineError(
                f"--engine {engine}: only with the backend python and an ONNX file, one of "
                f"{', '.join(ONNX_BACKENDS)}"
            )
        served = dataclasses.replace(served, backend=engine)
    _check_backend(served, backend)
    if gpus and served.backend == "onnxruntime":
        raise EngineError("--devices chooses GPUs, and this repository's instances are on none")
    if graphs and backend != "tensorrt":
        raise EngineError("--graphs: only Triton's backend tensorrt has CUDA graphs")
    batch = _max_batch(served, max_batch)
    known = _known_answers(served, reference).to_text()
    make = functools.partial(
        make_config,
        served,
        backend,
        max_batch=batch,
        instances=instances,
        gpus=gpus,
        graphs=graphs,
        known=known,
    )
    configs = {"config.pbtxt": make(None)}
    for scenario in SCENARIOS:
        configs[f"configs/{scenario}.pbtxt"] = make(scenario)
    try:
        with whole_folder(output) as partial:
            version = partial / MODEL_NAME / _VERSION
            version.mkdir(parents=True)
            (partial / MODEL_NAME / "configs").mkdir()
            _copy_model(served, backend, version)
            for name, config in configs.items():
                text = text_format.MessageToString(config)
                write_atomically(partial / MODEL_NAME / name, text.encode())
            arguments = _server_arguments(output, served, backend)
            write_atomically(partial / "README", _readme(served, backend, arguments).encode())
    except OSError as error:
        raise HarnessError(f"{error.filename}: cannot write it: {error.strerror}") from error
    return Repository(output, arguments)


def make_config(
    served: ServedModel,
    backend: str,
    scenario: str | None,
    *,
    max_batch: int,
    instances: int,
    gpus: Sequence[int],
    graphs: bool,
    known: str,
) -> ModelConfig:
    """Make the configuration of a model.

    Parameters
    ----------
    served, backend
        As in `write_repository`, checked.
    scenario
        One of `harness.loadgen.settings.SCENARIOS`; None: for all of them.
    max_batch, instances, gpus, graphs
        As in `write_repository`, checked.
    known
        `engine.backends.triton.known.KnownAnswers.to_text`.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(
        name=MODEL_NAME,
        backend=backend,
        max_batch_size=max_batch,
        default_model_filename=_FILES[backend],
        version_policy=pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All()),
        input=[
            pb.ModelInput(
                name=served.input.name,
                data_type=_data_type(pb, served),
                dims=served.input.shape,
            )
        ],
        output=[
            pb.ModelOutput(
                name=DETECTIONS,
                data_type=pb.TYPE_FP32,
                dims=[served.keep_top_k, DETECTION_FIELDS],
            ),
            # a number for each image: no dimension but the batch's
            pb.ModelOutput(
                name=NUM_DETECTIONS,
                data_type=pb.TYPE_INT32,
                dims=[1],
                reshape=pb.ModelTensorReshape(shape=[]),
            ),
        ],
        instance_group=[
            pb.ModelInstanceGroup(kind=_kind(pb, served, backend), count=instances, gpus=gpus)
        ],
        parameters={
            key: pb.ModelParameter(string_value=value)
            for key, value in (_parameters(served, backend) | {KNOWN_PARAMETER: known}).items()
        },
        model_warmup=[_warm_up(pb, served, size) for size in sorted({1, max_batch})],
    )
    if scenario != "SingleStream":
        preferred = MultiStream().samples_per_query if scenario == "MultiStream" else max_batch
        config.dynamic_batching.preferred_batch_size.append(min(preferred, max_batch))
        config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY_US.get(
            scenario or "", 0
        )
    if backend != "python":
        config.optimization.input_pinned_memory.enable = True
        config.optimization.output_pinned_memory.enable = scenario != "SingleStream"
    if backend == "tensorrt":
        # never with output_copy_stream: detections are then sent before they are written
        config.optimization.cuda.graphs = graphs
        config.optimization.cuda.busy_wait_events = scenario == "SingleStream"
    return config


def _known_answers(served: ServedModel, reference: Path | None) -> KnownAnswers:
    try:
        if reference is None:
            engine = load_engine(served.backend, served.path, max_batch=1)
        elif model_sha256(reference) == served.onnx_sha256:
            engine = load_engine("onnxruntime", reference)
        else:
            raise EngineError(f"{served.path} does not come from {reference}")
    except EngineError as error:
        if reference is not None:
            raise
        raise EngineError(
            f"{error}; the repository's known answers need it, or --reference with the ONNX file "
            "that it was built from"
        ) from error
    with progress_bar("known answers") as progress:
        return find_known(engine, progress)


def _check_backend(served: ServedModel, backend: str) -> None:
    built = {"tensorrt": "tensorrt", "onnxruntime": "onnxruntime"}.get(backend, served.backend)
    if served.backend != built:
        raise EngineError(
            f"{served.path} is for {served.backend}, which Triton's backend {backend} does not "
            "serve; the backend python does"
        )
    if backend == "tensorrt" and served.manifest and served.manifest.min_batch > 1:
        raise EngineError(
            f"{served.path}: its smallest batch is {served.manifest.min_batch}; Triton sends any "
            "from 1 on, so build it with --min-batch 1"
        )


def _max_batch(served: ServedModel, asked: int | None) -> int:
    most = served.manifest.max_batch if served.manifest else None
    if asked is not None and most is not None and asked > most:
        raise EngineError(f"{served.path} takes batches of up to {most}, not {asked}")
    return asked or most or DEFAULT_BATCH


def _data_type(pb: Any, served: ServedModel) -> Any:
    return pb.DataType.Value(f"TYPE_{DTYPES[served.input.dtype]}")


def _kind(pb: Any, served: ServedModel, backend: str) -> Any:
    """Where the instances run: engines on GPUs, ONNX Runtime where Triton's own finds one."""
    group = pb.ModelInstanceGroup
    if served.backend != "onnxruntime":
        return group.KIND_GPU
    return group.KIND_AUTO if backend == "onnxruntime" else group.KIND_CPU


def _parameters(served: ServedModel, backend: str) -> dict[str, str]:
    parameters = {**served.identity(), BACKEND_PARAMETER: served.backend}
    if served.manifest is not None:
        parameters["engine_sha256"] = served.manifest.engine_sha256
    if backend == "python":
        parameters[FILE_PARAMETER] = served.path.name
    return parameters


def _warm_up(pb: Any, served: ServedModel, batch: int) -> Any:
    image = pb.ModelWarmup.Input(
        data_type=_data_type(pb, served), dims=served.input.shape, zero_data=True
    )
    return pb.ModelWarmup(
        name=f"batch of {batch}", batch_size=batch, inputs={served.input.name: image}
    )


def _copy_model(served: ServedModel, backend: str, version: Path) -> None:
    """Copy the model, and the plugin libraries of an engine, into a version's folder."""
    source, manifest = served.path, served.manifest
    libraries = []
    if manifest is not None:
        for library, listed in zip(check_plugins(source, manifest), manifest.plugins, strict=True):
            shutil.copyfile(library, version / library.name)
            if _registering(library).is_file():
                shutil.copyfile(_registering(library), version / _registering(library).name)
            libraries.append(dataclasses.replace(listed, path=library.name))
    if manifest is None:
        for name in data_files(source):
            (version / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.parent / name, version / name)
    if backend != "python":
        shutil.copyfile(source, version / _FILES[backend])
        return
    write_atomically(version / _FILES[backend], _PYTHON_MODEL.encode())
    if manifest is None:
        shutil.copyfile(source, version / source.name)
    else:
        moved = dataclasses.replace(manifest, plugins=tuple(libraries))
        save_engine(version / source.name, check_engine(source, manifest), moved)


def _registering(plugin: Path) -> Path:
    """Return the library beside a plugin's that registers it when it is opened, as Triton does."""
    return plugin.with_name(f"{plugin.stem}_register{plugin.suffix}")


def _server_arguments(output: Path, served: ServedModel, backend: str) -> tuple[str, ...]:
    arguments = [f"--model-repository={output}"]
    if backend == "tensorrt" and served.manifest and served.manifest.plugins:
        folder = output / MODEL_NAME / _VERSION
        plugins = []
        for library in check_plugins(served.path, served.manifest):
            found = _registering(library)
            plugins.append(str(folder / (found if found.is_file() else library).name))
        arguments.append(f"--backend-config=tensorrt,plugins={';'.join(plugins)}")
    return tuple(arguments)


def _readme(served: ServedModel, backend: str, arguments: Sequence[str]) -> str:
    needs = {
        "tensorrt": f"It needs TensorRT {served.manifest.version if served.manifest else ''}",
        "onnxruntime": "It needs nothing else",
        "python": f"It needs this project and {served.backend} in the server's Python",
    }[backend]
    return (
        f"{MODEL_NAME} from {served.path.name} (ONNX SHA-256 {served.onnx_sha256}), for Triton's "
        f"backend {backend}.\n"
        f"Serve it: tritonserver {shlex.join(arguments)}\n"
        f"{needs}. If this folder moves, so do the paths above.\n"
        f"For one scenario alone add --model-config-name={'|'.join(SCENARIOS)}.\n"
        "Measure it: harness run MODEL --engine triton --url HOST:8001, MODEL the same file.\n"
    )

"""The route of a benchmark: weights, ONNX, preprocessed images, calibration, INT8, engine.

Every function makes one artefact with all that it needs, and rebuilds exactly what is stale.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.data.preprocessed import PreprocessedSet, load_preprocessed
from engine.errors import EngineError, naming
from engine.protocol import InputSpec
from engine.quantization.thresholds import METHODS
from engine.support.external import model_sha256
from engine.support.files import file_sha256
from engine.support.leaving import end_with_parent
from harness.artefacts import (
    Artefact,
    Say,
    code_sha256,
    make,
    remake,
    stale,
    version,
)
from harness.benchmarks import BENCHMARKS, benchmark_of_file
from harness.data.dataset import (
    check_annotated,
    check_images,
    check_map,
    known_dataset,
    preprocessed_dir,
)
from harness.data.record import images_artefact, images_sha256
from harness.errors import HarnessError

if TYPE_CHECKING:
    from engine.model import Detector
    from engine.quantization.cache import Calibration

Form = Literal["fp32", "fp16", "cpu"]
"""What lies between the INT8 islands of a graph, or the form for ONNX Runtime on a CPU."""

_INT8_SUFFIX = {"fp32": "int8", "fp16": "int8.fp16", "cpu": "int8.cpu"}
_QUANTIZATION_CODE = (
    *("engine/model.py", "engine/data/npy.py", "engine/data/preprocessed.py"),
    *("engine/quantization/*.py", "graph_surgery/*.py"),
)
"""What decides a calibration, and an INT8 graph."""

_STDERR = 2  # file descriptor
_PLUGIN = Path("plugins") / "libnmsoptplugin.so"


@dataclass(frozen=True)
class Route:
    """Where a benchmark's artefacts lie, and how to report on them.

    Attributes
    ----------
    benchmark
        Key of `BENCHMARKS`.
    weights
        Checkpoint, or an ONNX detector that needs no export.
    build_dir
        The build folder.
    say
        Takes one line for each artefact.
    dataset
        Name of its data set; see `harness.data.dataset.known_dataset`.
    image_size
        Side of the checkpoint's input image; None: what it says itself, or a guess that is said.
    entry
        Entry of the checkpoint that holds the weights; None: what export-onnx finds and says.
    """

    benchmark: str
    weights: Path
    build_dir: Path
    say: Say
    dataset: str
    image_size: int | None = None
    entry: str | None = None


def route_of(
    benchmark: str,
    weights: Path | None,
    build_dir: Path,
    say: Say,
    *,
    dataset: str | None = None,
    image_size: int | None = None,
    entry: str | None = None,
) -> Route:
    """Return the route of a benchmark; weights and data set are its own where none are given."""
    known = BENCHMARKS[benchmark]
    own = build_dir / known.weights if known.models else known.weights
    return Route(
        benchmark, weights or own, build_dir, say, dataset or known.dataset, image_size, entry
    )


def check_data(route: Route, *splits: str) -> None:
    """Make sure that the data set has splits, before hours of work for others.

    Raises
    ------
    HarnessError
        See `check_images`; once preprocessed, images need not be there any more.
    """
    for split in splits:
        data = known_dataset(route.dataset, split, route.build_dir)
        made = (route.build_dir / "preprocessed_data" / data.name).exists()
        (check_map if made else check_images)(data)


def build_onnx(route: Route) -> Path:
    """Weights to the surgered FP32 ONNX file; that its image size is a guess is always said.

    Raises
    ------
    HarnessError
        When the weights are missing or of another detector, or a command fails (it has said why).
    """
    from engine.model import load_detector, size_guess

    folder, known = route.build_dir / "onnx", BENCHMARKS[route.benchmark]
    if not route.weights.is_file():
        how = "the demo's are in the repository"
        if known.models:
            how = f"put them there (harness download model --benchmark {route.benchmark})"
        raise HarnessError(f"{route.weights}: no such weights; {how}, or name yours with WEIGHTS")
    detector = route.weights
    if detector.suffix == ".onnx" and route.image_size is not None:
        raise HarnessError(f"{detector} has its image size; leave out --image-size")
    if detector.suffix == ".onnx" and route.entry is not None:
        raise HarnessError(f"{detector} is no checkpoint with entries; leave out --entry")
    if detector.suffix != ".onnx":
        options = [] if route.image_size is None else ["--image-size", str(route.image_size)]
        options += [] if route.entry is None else ["--entry", route.entry]
        detector = folder / f"{route.benchmark}.onnx"
        exported = Artefact(
            "export-onnx",
            detector,
            {
                "weights": file_sha256(route.weights),
                "image size": str(route.image_size or "the checkpoint's own"),
                **({} if route.entry is None else {"entry": route.entry}),
                "code": code_sha256("export/*.py", "export/*/*.py"),
                "torch": version("torch"),
            },
        )
        make(
            exported,
            lambda: _command(
                "export", "--weights", route.weights, "-o", detector, "--force", *options
            ),
            route.say,
        )
    if (found := benchmark_of_file(detector, known)).detector != known.detector:
        raise HarnessError(
            f"{route.weights} is of {found.detector}, the benchmark {route.benchmark} of "
            f"{known.detector}: --benchmarks={found.name}"
        )
    surgered = Artefact(
        "graph-surgery",
        folder / f"{route.benchmark}.nms.onnx",
        {
            "ONNX": model_sha256(detector),
            "code": code_sha256("graph_surgery/*.py"),
            "onnx": version("onnx"),
            "onnx-graphsurgeon": version("onnx-graphsurgeon"),
        },
    )
    make(
        surgered,
        lambda: _command("graph_surgery", "nms", detector, surgered.path, "--force"),
        route.say,
    )
    if guess := size_guess(load_detector(surgered.path).metadata):
        route.say(
            f"image size: {guess} is a guess, which the weights do not tell; if it is another: "
            "--image-size SIDE, or IMAGE_SIZE=SIDE"
        )
    return surgered.path


def int8_form(backend: str, device: str) -> Form:
    """Form of the INT8 graph that a backend takes.

    TensorRT is strongly typed, and runs as float32 what the graph says is float32; ONNX Runtime on
    a CPU has a form of its own.
    """
    if backend == "onnxruntime" and device == "cpu":
        return "cpu"
    return "fp16" if backend.startswith("tensorrt") else "fp32"


@dataclass(frozen=True)
class Quantized:
    """An INT8 detector and what it was made from.

    Attributes
    ----------
    path
        INT8 ONNX file.
    model
        Surgered FP32 ONNX file.
    images
        float32 calibration images.
    calibration
        Its scales.
    """

    path: Path
    model: Path
    images: PreprocessedSet
    calibration: Calibration


def build_int8(route: Route, form: Form = "fp32") -> Quantized:
    """Weights and calibration images to the calibration cache and the INT8 ONNX file.

    What speaks against the calibration is said before it is used.

    Raises
    ------
    HarnessError, EngineError
        When a step fails.
    """
    from engine.model import load_detector
    from engine.quantization.cache import Calibration
    from engine.quantization.placement import find_placement
    from engine.quantization.quantize import quantize
    from engine.report import warn
    from graph_surgery.files import save

    check_data(route, "cal")
    detector = load_detector(build_onnx(route))
    with naming(detector.path):
        placement = find_placement(detector.model)
    images = preprocess(route, "cal", InputSpec(placement.image, placement.shape, "float32"))
    cache = build_cache(route, detector, images)
    calibration = Calibration.load(cache.path)
    warn(calibration)
    quantized = Artefact(
        "quantize",
        route.build_dir / "onnx" / f"{route.benchmark}.{_INT8_SUFFIX[form]}.onnx",
        {
            "ONNX": detector.sha256,
            "calibration": file_sha256(cache.path),
            "code": code_sha256(*_QUANTIZATION_CODE),
            "onnx-graphsurgeon": version("onnx-graphsurgeon"),
        },
    )

    def build() -> None:
        options: dict[str, Any] = {"target": form} if form == "cpu" else {"float_type": form}
        save(quantize(detector.model, calibration, **options), quantized.path)

    return Quantized(make(quantized, build, route.say), detector.path, images, calibration)


def build_cache(route: Route, detector: Detector, images: PreprocessedSet) -> Artefact:
    """Make the calibration cache of a surgered model from preprocessed images."""
    cache = Artefact(
        "calibrate",
        route.build_dir / "calibration" / f"{route.benchmark}.json",
        {
            "ONNX": detector.sha256,
            "calibration images": images_sha256(images),
            "method": METHODS[0],
            "code": code_sha256(*_QUANTIZATION_CODE),
            "onnx-graphsurgeon": version("onnx-graphsurgeon"),
            "onnxruntime": version("onnxruntime"),
        },
    )

    def build() -> None:
        from engine.quantization.calibration import calibrate
        from engine.support.progress import progress_bar

        with progress_bar("calibrate") as progress:
            calibrate(detector, images, progress=progress).save(cache.path)

    make(cache, build, route.say)
    return cache


def preprocess(route: Route, split: str, spec: InputSpec) -> PreprocessedSet:
    """Preprocess a split of the benchmark's data set, or what has changed in it.

    Raises
    ------
    HarnessError, EngineError
        See `harness.data.preprocess.preprocess`.
    """
    from harness.data.preprocess import open_current
    from harness.data.preprocess import preprocess as preprocess_images

    data = known_dataset(route.dataset, split, route.build_dir)
    check_annotated(data)
    directory = preprocessed_dir(route.build_dir, data, spec)
    images = images_artefact(data, spec, directory)
    reason = stale(images)
    if reason is None:
        try:
            open_current(data, spec, directory)
        except (EngineError, HarnessError) as error:
            reason = str(error).partition("; ")[0]
    if reason is None:
        route.say(f"{images.step}: reused {directory}")
    else:
        remake(
            images,
            lambda: preprocess_images(
                data,
                spec,
                directory,
                workers=len(os.sched_getaffinity(0)),
                overwrite=False,  # it notices itself what is stale
                skip_bad=False,
                progress=sys.stderr.isatty(),
                say=route.say,
            ),
            route.say,
            reason,
        )
    return load_preprocessed(directory, spec)


def build_engine(route: Route, model: Path, backend: str, batch: int | None) -> Path:
    """INT8 ONNX to the file that a backend loads: an engine, or the ONNX itself.

    Parameters
    ----------
    route
        The benchmark.
    model
        INT8 ONNX file.
    backend
        Key of `engine.load.BACKENDS`.
    batch
        Largest batch, and the one to tune for; None for a backend that takes any.

    Raises
    ------
    EngineError
        When the engine cannot be built.
    """
    if batch is None:
        route.say(f"engine: {backend} runs {model} as it is")
        return model
    from engine.backends.tensorrt.build import build
    from engine.backends.tensorrt.module import import_tensorrt
    from engine.backends.tensorrt.options import BuildOptions
    from engine.model import load_detector
    from engine.support.environment import gpu_name

    folder = route.build_dir / "engines"
    plugin = route.build_dir / _PLUGIN
    built = Artefact(
        f"engine batch {batch}",
        folder / f"{route.benchmark}.{backend}.b{batch}.engine",
        {
            "ONNX": model_sha256(model),
            "backend": f"{backend} {import_tensorrt(backend).__version__}",
            "GPU": gpu_name() or "none",
            "plugin": file_sha256(plugin) if plugin.exists() else "none",
            "code": code_sha256(
                "engine/backends/tensorrt/build.py",
                "engine/backends/tensorrt/plan.py",
                "graph_surgery/nms_body.py",
                "graph_surgery/nms_function.py",
            ),
        },
    )
    options = BuildOptions(
        max_batch=batch,
        timing_cache=folder / "timing.cache" if backend == "tensorrt" else None,
        plugins=(plugin,) if plugin.exists() else (),
    )
    return make(built, lambda: build(load_detector(model), backend, built.path, options), route.say)


def _command(room: str, *arguments: str | Path) -> None:
    """Run the command of a room that this one must not import; what it prints goes to stderr."""
    command = [sys.executable, "-m", room, *map(str, arguments)]
    done = subprocess.run(command, stdout=_STDERR, check=False, preexec_fn=end_with_parent)
    if done.returncode != 0:
        raise HarnessError(f"python -m {room} failed with exit code {done.returncode}; see above")

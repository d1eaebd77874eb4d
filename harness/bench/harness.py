"""Four measurements of the harness itself: ``python -m harness.bench harness``.

1. efficiency: Offline samples/s through LoadGen over those of the bare engine in a plain loop, at
   the same batch and threads, in turns;
2. latency: Server p99 with an engine that does nothing at 1,000 queries/s;
3. overhead: samples/s with an engine that does nothing, over those of a SUT that answers in
   LoadGen's own call;
4. preprocessing: images/s over those of a plain OpenCV loop on one core times the processes used.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import DTypeLike, NDArray

from engine.backends.blocking import BlockingSession
from engine.data.preprocessed import MEAN, STD
from engine.load import load_engine
from engine.protocol import DETECTION_FIELDS, Engine, InputSpec, Session
from engine.support.environment import circumstances, now
from engine.support.files import write_atomically, write_json
from harness.benchmarks import DEFAULT
from harness.data.dataset import Dataset, known_dataset, load_map
from harness.data.preprocess import preprocess
from harness.errors import HarnessError
from harness.loadgen.log import DetailLog, read_complete
from harness.loadgen.qsl import SampleSource
from harness.loadgen.settings import Offline, Server, Settings, apply
from harness.loadgen.test import USER_CONF, Outcome, run_test

_SAMPLES_IN_MEMORY = 64
_NULL_QPS = 1000.0
_OVERHEAD_BATCH = 64
_OVERHEAD_SAMPLES = 50_000  # Offline
_SATURATING_QPS = 200_000.0  # Server, without batches: more than Python answers


def bench(
    model: Annotated[Path, typer.Argument(help="Model for the efficiency.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    *,
    engine: Annotated[str, typer.Option(help="Its engine.")] = "onnxruntime",
    dataset: Annotated[str, typer.Option(help="Images to preprocess: coco or demo.")] = "demo",
    image_size: Annotated[int, typer.Option(help="Size to preprocess to.")] = 1200,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads and processes.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians count.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a turn.")] = 10.0,
    build_dir: Annotated[Path, typer.Option(envvar="BUILD_DIR", help="Build folder.")] = Path(
        "build"
    ),
) -> None:
    """Measure the harness and write the figures to a JSON file."""
    loaded = load_engine(engine, model, threads=threads, max_batch=batch)
    data = known_dataset(dataset, "val", build_dir)
    document: dict[str, Any] = {
        "finished": now(),
        **circumstances("mlcommons-loadgen", "numpy", "onnxruntime", "opencv-python-headless"),
        "engine": dict(loaded.manifest),
    }
    steps: dict[str, Callable[[], dict[str, object]]] = {
        "efficiency": lambda: measure_efficiency(loaded, batch, rounds, seconds),
        "null_server": lambda: measure_null_server(rounds, seconds),
        "overhead": lambda: measure_overhead(rounds, seconds / 40),
        "preprocessing": lambda: measure_preprocessing(data, image_size, threads, rounds),
    }
    for name, measure in steps.items():
        document[name] = measure()
        typer.echo(f"{name}: {json.dumps(document[name])}")
    document["finished"] = now()
    write_json(output, document)


def measure_efficiency(
    engine: Engine, batch: int, rounds: int, seconds: float
) -> dict[str, object]:
    """Compare Offline samples/s through LoadGen with a plain loop over the same images.

    Beside it, the share of the Offline time that passed inside the engine: on a machine that is
    not quiet, it tells what the harness itself costs.
    """
    source = RandomImages(engine.input_spec)
    images = np.empty((_SAMPLES_IN_MEMORY, *engine.input_spec.shape), engine.input_spec.dtype)
    source.read_into(images, range(_SAMPLES_IN_MEMORY))
    session = engine.session()
    session.infer(images[:batch])
    batches = max(1, round(_loop_rate(session, images, batch, 2) * seconds / batch))
    samples = batches * batch
    settings = Offline(min_duration_ms=1, min_query_count=samples, target_qps=1.0, batch_size=batch)
    loop, offline, share = [], [], []
    for _ in range(rounds):
        loop.append(_loop_rate(session, images, batch, batches))
        outcome = run_once(engine, source, settings)
        offline.append(outcome.detail.values["result_samples_per_second"])
        share.append(sum(outcome.batch_seconds) * offline[-1] / samples)
    return {
        "batch": batch,
        "samples": samples,
        "loop_samples_per_second": loop,
        "offline_samples_per_second": offline,
        "share_inside_engine": share,
        "efficiency": statistics.median(offline) / statistics.median(loop),
    }


def measure_null_server(rounds: int, seconds: float) -> dict[str, object]:
    """Server latency when the engine does nothing."""
    engine = NullEngine()
    settings = Server(
        min_duration_ms=round(seconds * 1000), target_qps=_NULL_QPS, batch_delay_ms=0.0
    )
    p99 = [
        run_once(engine, RandomImages(engine.input_spec), settings).detail.latency_ms["p99"]
        for _ in range(rounds)
    ]
    return {
        "queries_per_second": _NULL_QPS,
        "p99_ms": p99,
        "median_p99_ms": statistics.median(p99),
    }


def measure_overhead(rounds: int, seconds: float) -> dict[str, object]:
    """Most samples per second through LoadGen, with nothing to do.

    Parameters
    ----------
    rounds
        Turns.
    seconds
        Length of the Server schedule.

    Returns
    -------
    dict
        For Offline in batches and Server in single samples: samples/s of the harness in each turn,
        those of a SUT that does nothing else than complete its samples (in Server, the schedule's
        when it keeps up), and the ratio of medians.
    """
    engine = NullEngine()
    settings: Sequence[tuple[Settings, str]] = (
        (
            Offline(
                min_duration_ms=1,
                min_query_count=_OVERHEAD_SAMPLES,
                target_qps=1.0,
                batch_size=_OVERHEAD_BATCH,
            ),
            "result_samples_per_second",
        ),
        (
            Server(
                min_duration_ms=max(1, round(1000 * seconds)),
                target_qps=_SATURATING_QPS,
                batch_size=1,
                batch_delay_ms=0.0,
            ),
            "result_completed_samples_per_sec",
        ),
    )
    found: dict[str, object] = {}
    for setting, key in settings:
        ours, bare = [], []
        for _ in range(rounds):
            bare.append(bare_run(setting).values[key])
            ours.append(
                run_once(engine, RandomImages(engine.input_spec), setting).detail.values[key]
            )
        found[setting.scenario] = {
            "batch": setting.batch,
            "samples_per_second": ours,
            "bare_samples_per_second": bare,
            "ratio": statistics.median(ours) / statistics.median(bare),
        }
    return found


def measure_preprocessing(
    dataset: Dataset, image_size: int, workers: int, rounds: int
) -> dict[str, object]:
    """Compare `harness.data.preprocess` with a plain OpenCV loop on one core times the processes.

    The rate is that of the images after the start of the processes, which takes as long for 5,000
    images as for the few that are measured here: the time for all, less that for one each.
    """
    spec = InputSpec("image", (3, image_size, image_size), "float32")
    names = load_map(dataset.map_file)

    def ours(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            some = Path(folder) / "map.txt"
            write_atomically(some, "".join(f"{name}\n" for name in names[:count]).encode())
            start = time.perf_counter()
            preprocess(
                dataclasses.replace(dataset, map_file=some),
                spec,
                Path(folder) / "out",
                workers=workers,
                overwrite=True,
                skip_bad=False,
                progress=False,
                say=typer.echo,
            )
            return time.perf_counter() - start

    start_up, whole, plain = [], [], []
    for _ in range(rounds):
        plain.append(len(names) / _plain_preprocess(dataset.image_dir, names, image_size))
        start_up.append(ours(workers))
        whole.append(ours(len(names)))
    rates = [
        (len(names) - workers) / (long - short) for short, long in zip(start_up, whole, strict=True)
    ]
    return {
        "images": len(names),
        "image_size": image_size,
        "workers": workers,
        "plain_images_per_second": plain,
        "start_up_seconds": start_up,
        "whole_seconds": whole,
        "images_per_second": rates,
        "efficiency": statistics.median(rates) / (statistics.median(plain) * workers),
    }


class RandomImages:
    """Normalised noise, the same in every load."""

    def __init__(self, spec: InputSpec) -> None:
        self.files = tuple(f"{number}.jpg" for number in range(_SAMPLES_IN_MEMORY))
        random = np.random.default_rng(0)
        images = random.standard_normal((_SAMPLES_IN_MEMORY, *spec.shape), np.float32)
        if spec.scale is not None:
            images = np.clip(np.rint(images / spec.scale), -127, 127)
        self._images = images.astype(spec.dtype)

    def read_into(self, batch: NDArray[np.generic], indices: Sequence[int]) -> None:
        """See `harness.loadgen.qsl.SampleSource.read_into`."""
        batch[:] = self._images[list(indices)]


class NullEngine:
    """Answers ten detections for every image, after so many seconds for a batch."""

    input_spec = InputSpec("image", (3, 8, 8), "float32")
    max_batch = None
    manifest: Mapping[str, object] = {"backend": "null"}

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._detections = np.ones((_SAMPLES_IN_MEMORY, 200, DETECTION_FIELDS), np.float32)
        self._detections[..., 0] = np.arange(_SAMPLES_IN_MEMORY)[:, None]
        self._counts = np.full(_SAMPLES_IN_MEMORY, 10, np.int32)

    def session(self) -> BlockingSession:
        """See `engine.protocol.Engine.session`."""
        return BlockingSession(lambda _: None, self._infer)

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See `engine.protocol.Engine.host_array`."""
        return np.empty(shape, dtype)

    def _infer(self, images: NDArray[np.generic]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        if self._seconds:
            time.sleep(self._seconds)
        return self._detections[: len(images)], self._counts[: len(images)]


def _loop_rate(session: Session, images: NDArray[np.generic], batch: int, batches: int) -> float:
    """Samples per second of a plain loop over whole batches of the images."""
    starts = range(0, len(images) - batch + 1, batch)
    begin = time.perf_counter()
    for number in range(batches):
        start = starts[number % len(starts)]
        session.infer(images[start : start + batch])
    return batches * batch / (time.perf_counter() - begin)


def run_once(engine: Engine, source: SampleSource, settings: Settings) -> Outcome:
    """Run LoadGen on an engine, and keep no logs."""
    with tempfile.TemporaryDirectory() as folder:
        return run_test((engine,), source, settings, "PerformanceOnly", Path(folder), timeout_s=600)


def _answer(samples: Sequence[Any]) -> None:
    import mlperf_loadgen as lg

    lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])


def bare_run(settings: Settings, answer: Callable[[Sequence[Any]], None] = _answer) -> DetailLog:
    """LoadGen with the shortest SUT that Python can be: it answers a query within the call."""
    import mlperf_loadgen as lg

    with tempfile.TemporaryDirectory() as folder:
        test = apply(settings, "PerformanceOnly", Path(folder) / USER_CONF, DEFAULT.detector)
        output = lg.LogOutputSettings()
        output.outdir = folder
        log = lg.LogSettings()
        log.log_output = output
        log.enable_trace = False
        sut = lg.ConstructSUT(answer, lambda: None)
        qsl = lg.ConstructQSL(
            _SAMPLES_IN_MEMORY, _SAMPLES_IN_MEMORY, lambda _: None, lambda _: None
        )
        lg.StartTestWithLogSettings(sut, qsl, test, log, "")
        lg.DestroyQSL(qsl)
        lg.DestroySUT(sut)
        return read_complete(Path(folder), accuracy=False)


def _plain_preprocess(image_dir: Path, names: tuple[str, ...], size: int) -> float:
    """Seconds of what MLPerf's reference does, image by image, on one core."""
    import cv2

    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for name in names:
            image = cv2.imread(str(image_dir / name))
            if image is None:
                raise HarnessError(f"{image_dir / name} cannot be read")
            rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)
            large = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_LINEAR)
            pixels = (large / 255 - mean) / std
            np.save(Path(folder) / f"{name}.npy", np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        seconds = time.perf_counter() - start
    cv2.setNumThreads(threads)
    return seconds

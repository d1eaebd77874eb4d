"""One LoadGen test: from settings to complete log files, or to an error, but never to a hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg
import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.protocol import Engine, first_label
from engine.support.files import write_atomically
from engine.support.progress import Progress
from harness.benchmarks import DEFAULT
from harness.errors import HarnessError, RunFailedError
from harness.loadgen.audit import Audit
from harness.loadgen.clock import CLOCK_WAS_SET, WallClock, check_times
from harness.loadgen.log import DetailLog, read_complete
from harness.loadgen.numa import gpu_cpus, running_on
from harness.loadgen.qsl import SampleLibrary, SampleSource
from harness.loadgen.response import ANY_LABEL
from harness.loadgen.settings import (
    Mode,
    MultiStream,
    Server,
    Settings,
    SingleStream,
    apply,
    fitted,
)
from harness.loadgen.sut import Sut

USER_CONF = "user.conf"
AUDIT_CONFIG = "audit.config"

_POLL_SECONDS = 0.2
_POLLS_PER_REPORT = 5  # drawing takes the GIL for some milliseconds, which the latencies feel
_GRACE_SECONDS = 2.0
_IDLE_SECONDS = 300.0


@dataclass(frozen=True)
class Outcome:
    """What a complete test left.

    Attributes
    ----------
    detail
        LoadGen's detail log.
    settings
        As used, estimates filled in.
    batch_seconds
        Seconds of each batch from its submission to its result, in order of the results.
    latencies
        float64 [N, 2]: when each sample was done, from the first query on, and how long after its
        own query; seconds. In Offline, which is one query, of batches in the engine instead.
    losses
        One sentence for each session that was lost.
    lost_devices
        Devices that no session was left on at the end.
    """

    detail: DetailLog
    settings: Settings
    batch_seconds: tuple[float, ...]
    latencies: NDArray[np.float64]
    losses: tuple[str, ...]
    lost_devices: tuple[str, ...]


def run_test(
    engines: Sequence[Engine],
    source: SampleSource,
    settings: Settings,
    mode: Mode,
    directory: Path,
    *,
    timeout_s: float,
    progress: Progress | None = None,
    audit: Audit | None = None,
    labels: range | None = None,
    detector: str = DEFAULT.detector,
) -> Outcome:
    """Run one LoadGen test and read its logs back.

    Parameters
    ----------
    engines
        The engine under test, on every device.
    source
        Preprocessed images that fit the engine's input.
    settings
        Scenario and its settings; None values are estimated in a warm-up.
    mode
        ``PerformanceOnly`` or ``AccuracyOnly``.
    directory
        Existing folder for user.conf and LoadGen's logs.
    timeout_s
        Longest time in seconds that the engine may take for one batch.
    progress
        Called about once a second and at the end.
    audit
        Compliance test that the run belongs to.
    labels
        Those that a detection may have; None: any from the engine's first on. An accuracy run
        checks the labels, the order of images, scores and corners in every batch, a performance
        run in one of 50 ms.
    detector
        LoadGen's name of the model.

    Raises
    ------
    HarnessError
        When the engine or LoadGen refuses the settings, or its logs are not complete.
    RunFailedError
        When the engine fails, does not answer in time, or the user interrupts.
    """
    limit = min((engine.max_batch for engine in engines if engine.max_batch), default=None)
    best = [int(str(e.manifest["opt_batch"])) for e in engines if "opt_batch" in e.manifest]
    settings = fitted(settings, limit, min(best, default=None))
    library = SampleLibrary(source, engines)
    batch = min(settings.batch, limit or settings.batch)
    sut = Sut(
        engines,
        library,
        batch=batch,
        max_wait_s=settings.max_wait_s,
        streams=settings.streams,
        one_by_one=isinstance(settings, SingleStream | MultiStream),
        check_all=mode == "AccuracyOnly",
        labels=labels or range(first_label(engines[0].manifest), ANY_LABEL.stop),
    )
    total = len(source.files)
    warm_up = [index % total for index in range(batch)]
    cpus = gpu_cpus(str(engines[0].manifest.get("device")))
    try:
        with running_on(cpus):
            library.load(warm_up)
        # an engine may have to prepare for every size of a batch, and Server brings them all
        sut.start(warm_up, range(1, batch) if isinstance(settings, Server) else ())
        while not sut.wait_ready(_POLL_SECONDS):
            if sut.stalled_for() > timeout_s:
                sut.fail(_timeout(timeout_s))
        if sut.failure is None:
            settings = settings.estimated(sut.warm_up_seconds * settings.batch / batch)
            try:
                test = apply(settings, mode, directory / USER_CONF, detector)
            except BaseException:
                sut.stop(_GRACE_SECONDS)
                library.close()
                raise
            thread = _StartTest(
                sut=sut,
                library=library,
                test=test,
                directory=directory,
                audit=audit,
                sizes=(total, settings.performance_sample_count),
                cpus=cpus,
            )
            report = _reporter(sut, progress, settings, mode, total)
            pause_s = _longest_pause(settings, timeout_s)
            _watch(sut, thread, timeout_s=timeout_s, pause_s=pause_s, mode=mode, report=report)
        sut.stop(_GRACE_SECONDS)
        _raise_failure(sut)
        library.close()  # after a failure a session may still read it
    except KeyboardInterrupt:
        raise RunFailedError("interrupted", exit_code=130) from None
    detail = read_complete(directory, accuracy=mode == "AccuracyOnly")
    if mode == "PerformanceOnly":
        check_times(settings.scenario, detail.values, sut.times)
    return Outcome(
        detail,
        settings,
        tuple(done.batch_seconds for done in sut.completions),
        _latencies(sut, of_batches=settings.scenario == "Offline"),
        tuple(sut.losses),
        sut.lost_devices,
    )


def _latencies(sut: Sut, *, of_batches: bool) -> NDArray[np.float64]:
    """See `Outcome`."""
    done = sut.completions
    ends = np.array([one.time for one in done], np.float64)
    if of_batches:
        seconds = np.array([one.batch_seconds for one in done], np.float64)
    else:
        ends = np.repeat(ends, [len(one.arrivals) for one in done])
        arrivals = chain.from_iterable(one.arrivals for one in done)
        seconds = ends - np.fromiter(arrivals, np.float64)
    return np.stack([ends - sut.times.first_query, seconds], axis=1)


class _StartTest(threading.Thread):
    """StartTest on its own thread, so that the caller's can watch it and take signals."""

    def __init__(
        self,
        *,
        sut: Sut,
        library: SampleLibrary,
        test: Any,
        directory: Path,
        audit: Audit | None,
        sizes: tuple[int, int],
        cpus: frozenset[int] | None,
    ) -> None:
        super().__init__(name="loadgen", daemon=True)
        self._sut = sut
        self._library = library
        self._test = test
        self._directory = directory
        self._audit = audit
        self._sizes = sizes
        self._cpus = cpus
        self.ended = threading.Event()

    def run(self) -> None:
        """Run the test; nothing is raised, an error is the SUT's failure."""
        try:
            with running_on(self._cpus):  # it loads the samples
                self._run()
        except BaseException as error:
            self._sut.fail(error)
        finally:
            self.ended.set()

    def _run(self) -> None:
        output = lg.LogOutputSettings()
        output.outdir = str(self._directory)
        log = lg.LogSettings()
        log.log_output = output
        log.enable_trace = False  # hundreds of megabytes
        qsl = lg.ConstructQSL(*self._sizes, self._load, self._library.unload)
        sut = lg.ConstructSUT(self._sut.issue, lambda: None)  # nothing is held back
        # the empty name: LoadGen would else obey an audit.config in the working directory
        config = ""
        if self._audit is not None:
            config = str(self._directory / AUDIT_CONFIG)
            write_atomically(Path(config), self._audit.config.encode())
            self._test.test05 = self._audit.other_seeds
        lg.StartTestWithLogSettings(sut, qsl, self._test, log, config)
        lg.DestroySUT(sut)
        lg.DestroyQSL(qsl)

    def _load(self, indices: list[int]) -> None:
        try:
            self._library.load(indices)
            self._sut.loaded()
        except BaseException as error:  # an exception in a callback kills LoadGen
            self._sut.fail(error)


def _watch(
    sut: Sut,
    test: _StartTest,
    *,
    timeout_s: float,
    pause_s: float,
    mode: Mode,
    report: Callable[[], None],
) -> None:
    """Start the test and stay until it ends or fails."""
    clock = WallClock()
    test.start()
    polls = 0
    ended = False
    while not ended and sut.failure is None:
        ended = test.ended.wait(_POLL_SECONDS)
        if sut.stalled_for() > timeout_s:
            sut.fail(_timeout(timeout_s))
        elif (step := clock.step()) and mode == "PerformanceOnly":
            sut.fail(HarnessError(f"{CLOCK_WAS_SET} (by {step:+.3f} s)"))
        elif sut.idle_for() > pause_s:
            sut.fail(HarnessError(f"LoadGen has sent no query for {pause_s:.0f} s"))
        polls += 1
        if ended or polls % _POLLS_PER_REPORT == 0:
            report()
    # All samples are completed, so LoadGen may end by itself; if not, it is left behind.
    if not test.ended.wait(_GRACE_SECONDS):
        _raise_failure(sut)


def _longest_pause(settings: Settings, timeout_s: float) -> float:
    """Seconds for which a test may be without a query, as while LoadGen writes its logs.

    Of Server's times between arrivals, which are exponential, one in e^40 is longer than 40 means.
    """
    pause_s = max(timeout_s, _IDLE_SECONDS)
    if isinstance(settings, Server) and settings.target_qps is not None:
        pause_s += 40 / settings.target_qps
    return pause_s


def _reporter(
    sut: Sut, progress: Progress | None, settings: Settings, mode: Mode, total: int
) -> Callable[[], None]:
    def report() -> None:
        if progress is None:
            return
        known = None
        if mode == "AccuracyOnly":
            known = total
        elif settings.scenario == "Offline":
            known = sut.issued or None
        progress(sut.completed, known)

    return report


def _timeout(seconds: float) -> EngineError:
    return EngineError(
        f"no sample was completed for {seconds:g} s; give a slow engine more time with --timeout"
    )


def _raise_failure(sut: Sut) -> None:
    error = sut.failure
    if error is None:
        return
    if isinstance(error, EngineError | HarnessError):
        raise RunFailedError(str(error)) from error
    raise RunFailedError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error

"""What each make target does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from engine.data.preprocessed import PreprocessedSet
from engine.load import ONNX_BACKENDS
from harness.benchmarks import BENCHMARKS
from harness.data.dataset import known_dataset
from harness.data.oddities import check_classes, oddities
from harness.errors import RunFailedError
from harness.loadgen.settings import Settings, largest_batch, settings_from
from harness.make.arguments import FAST, RunArgs
from harness.make.route import (
    Route,
    build_engine,
    build_int8,
    build_onnx,
    check_data,
    int8_form,
    preprocess,
)
from harness.make.system_config import SystemConfig, system_config
from harness.make.triton import make_repository, servers_of
from harness.results.devices import load_engines
from harness.results.run import Benchmark
from harness.results.run_all import Test, new_folder, run_all
from harness.triton.server import find_server

TIMEOUT_S = 300.0
"""Longest time in seconds that the engine may take for one batch."""


def make_onnx(routes: Sequence[Route], _: RunArgs) -> None:
    """Make the surgered FP32 ONNX files."""
    for route in routes:
        build_onnx(route)


def calibrate(routes: Sequence[Route], _: RunArgs) -> None:
    """Make the calibration caches and the INT8 ONNX files, and hold these against FP32.

    Raises
    ------
    RunFailedError
        When INT8 does not find what FP32 finds on the calibration images.
    """
    from engine.comparison.agreement import find_agreement
    from engine.report import agreement_lines, calibration_report
    from graph_surgery.terminal import new_console

    for route in routes:
        made = build_int8(route)
        found = find_agreement(made.model, made.path, made.images)
        new_console().print(calibration_report(made.calibration))
        new_console().print(agreement_lines(found, made.calibration))
        if not found.passed:
            raise RunFailedError(f"{made.path} does not find what {made.model} finds")


def preprocess_data(routes: Sequence[Route], _: RunArgs) -> None:
    """Preprocess both splits; the INT8 images need the scale of the calibration."""
    for route in routes:
        check_data(route, "val")
        val_images(route, build_int8(route).path)


def generate_engines(routes: Sequence[Route], arguments: RunArgs) -> None:
    """Make the engines of all scenarios."""
    for route in routes:
        config, settings = _settings(route, arguments)
        model = build_int8(route, int8_form(config.builder, config.device)).path
        files = _engines(route, model, config, settings)
        if config.engine == "triton":
            for file in dict.fromkeys(files.values()):
                make_repository(route, file, config, settings)


def run_harness(routes: Sequence[Route], arguments: RunArgs) -> None:
    """Run every scenario in every test mode on its engine, and print the table of the results."""
    with ExitStack() as servers:
        run_all(_tests(routes, arguments, servers), routes[0].build_dir)


def _tests(routes: Sequence[Route], arguments: RunArgs, servers: ExitStack) -> list[Test]:
    """All that is to be run; Triton servers that are started for it go into `servers`."""
    tests: list[Test] = []
    root: Path | None = None
    for route in routes:
        config, settings = _settings(route, arguments)
        check_data(route, "val", "cal")
        if config.engine == "triton" and arguments.urls is None and config.url is None:
            find_server(route.build_dir)  # missing, it is missed before hours of preparation
        model = build_int8(route, int8_form(config.builder, config.device)).path
        files = _engines(route, model, config, settings)
        images = val_images(route, model)
        data = known_dataset(route.dataset, "val", route.build_dir)
        check_classes(data, model)
        warnings = oddities(data, images, model) if "AccuracyOnly" in arguments.modes else ()
        engines = {}
        for file in dict.fromkeys(files.values()):
            urls = arguments.urls
            devices = config.devices if urls is None else None
            if config.engine == "triton" and urls is None:
                urls = servers_of(route, file, config, settings, servers)
                # where a server is started for them, they are its repository's
                devices = config.devices if config.url else None
            engines[file] = load_engines(
                config.engine,
                file,
                device=None if config.engine == "triton" else config.device,
                devices=devices,
                threads=config.threads,
                urls=urls,
                max_batch=largest_batch(one for one in settings if files[one.scenario] == file),
            )
        root = root or new_folder(route.build_dir / "logs")
        folder = root / config.name / route.benchmark
        detector = BENCHMARKS[route.benchmark].detector
        tests += [
            (
                Benchmark(
                    engines[files[setting.scenario]],
                    images,
                    data,
                    TIMEOUT_S,
                    warnings=warnings,
                    detector=detector,
                ),
                setting,
                mode,
                folder / setting.scenario / mode,
            )
            for mode in arguments.modes
            for setting in settings
        ]
    return tests


TARGETS = {
    "onnx": make_onnx,
    "preprocess_data": preprocess_data,
    "calibrate": calibrate,
    "generate_engines": generate_engines,
    "run_harness": run_harness,
    "run": run_harness,  # which makes the engines that it needs
}
"""Name of a make target to what it does."""


def val_images(route: Route, model: Path) -> PreprocessedSet:
    """Preprocess the validation images for an INT8 ONNX file."""
    from engine.model import load_detector

    return preprocess(route, "val", load_detector(model).input)


def _settings(route: Route, arguments: RunArgs) -> tuple[SystemConfig, tuple[Settings, ...]]:
    """Configuration of the machine, said in one line, and the settings of the scenarios."""
    config = system_config(route.benchmark, arguments.version, arguments.system)
    config = replace(config, devices=arguments.devices or config.devices)
    where = f"{config.engine} on {config.device}"
    if config.source is None:
        route.say(
            f"system: {config.name} has no configuration for {route.benchmark}: {where}, targets "
            "from a warm-up; `harness tune` measures and writes one"
        )
    else:
        route.say(f"system: {config.source} [{arguments.version}]: {where}")
    overrides = {"streams": arguments.streams, **(FAST if arguments.fast else {})}
    return config, settings_from(config.tables, arguments.scenarios, overrides)


def _engines(
    route: Route, model: Path, config: SystemConfig, settings: Sequence[Settings]
) -> dict[str, Path]:
    """Engine file of each scenario; scenarios with the same batch share one."""
    files = {
        batch: build_engine(route, model, config.builder, batch)
        for batch in dict.fromkeys(_batch(config, setting) for setting in settings)
    }
    return {setting.scenario: files[_batch(config, setting)] for setting in settings}


def _batch(config: SystemConfig, settings: Settings) -> int | None:
    return None if config.builder in ONNX_BACKENDS else settings.batch

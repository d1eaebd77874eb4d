"""The Triton servers of ``make run``: those that are named, or one that is started here."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from engine.load import ONNX_BACKENDS
from harness.loadgen.settings import Settings, largest_batch
from harness.make.route import Route
from harness.make.system_config import SystemConfig
from harness.results.devices import parse_urls
from harness.triton.repository import Repository, write_repository
from harness.triton.server import find_server, running_server


def make_repository(
    route: Route, model: Path, config: SystemConfig, settings: Sequence[Settings]
) -> Repository:
    """Write the model repository of a model file anew, in the build folder.

    Raises
    ------
    HarnessError, EngineError
        See `harness.triton.repository.write_repository`.
    """
    folder = route.build_dir / "model_repository" / model.stem
    shutil.rmtree(folder, ignore_errors=True)
    onnx = config.builder in ONNX_BACKENDS
    repository = write_repository(
        model,
        folder,
        "python" if onnx else config.builder,
        engine=config.builder if onnx else None,
        max_batch=largest_batch(settings) if onnx else None,
        instances=max(setting.streams for setting in settings),
        gpus=config.devices or (),
    )
    route.say(f"triton: wrote {folder}: tritonserver {shlex.join(repository.server_arguments)}")
    return repository


def servers_of(
    route: Route,
    model: Path,
    config: SystemConfig,
    settings: Sequence[Settings],
    stack: ExitStack,
) -> tuple[str, ...]:
    """Return the configuration's servers, or start one for `model`, which `stack` stops.

    Raises
    ------
    HarnessError, EngineError
        When there is none to start, it does not start, or see `make_repository`.
    """
    if config.url is not None:
        return parse_urls(config.url)
    command = find_server(route.build_dir)
    repository = make_repository(route, model, config, settings)
    log = repository.path.with_name(f"{repository.path.name}.log")
    server = stack.enter_context(running_server(command, repository, log))
    route.say(f"triton: {command} serves it on {server.url}, its log is {log}")
    return (server.url,)

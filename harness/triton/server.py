"""Triton Inference Server as a process of this machine: installing one, starting and stopping it.

``python -m harness.triton.server FOLDER`` installs a server that needs no container: the binary of
the package nvidia-pytriton, which has only the Python backend, in a virtual environment of its own,
because that package wants another NumPy. Its command is FOLDER/bin/tritonserver.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from engine.backends.triton.engine import START_UP_SECONDS
from engine.support.environment import distribution
from engine.support.files import write_atomically
from engine.support.leaving import end_with_parent, on_leaving
from engine.support.progress import progress_bar
from harness.command import run_command
from harness.errors import HarnessError
from harness.triton.repository import SERVER_BACKENDS, Repository

PACKAGE = "nvidia-pytriton==0.7.0"
"""Triton 2.51; Apache-2.0 and the licences of what it bundles."""

_ROOT = Path(__file__).resolve().parents[2]
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.1
_SCRIPT = """#!/bin/sh
# Triton Inference Server with its Python backend in this virtual environment.
PATH="{venv}/bin:$PATH" exec "{server}/bin/tritonserver" \\
  --backend-directory="{server}/backends" "$@"
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class TritonServer:
    """A running server.

    Attributes
    ----------
    url
        ``127.0.0.1:PORT`` of its gRPC endpoint.
    process
        The process, leader of its own group.
    shared
        How the names of its shared memory begin.
    """

    url: str
    process: subprocess.Popen[bytes]
    shared: str
    _stopped: list[bool] = field(default_factory=list, repr=False)

    def stop(self) -> None:
        """End the server and the processes of its models; only the first call does anything."""
        if self._stopped:
            return
        self._stopped.append(True)
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in Path("/dev/shm").glob(f"{self.shared}*"):  # noqa: S108
            left.unlink(missing_ok=True)


def find_server(build_dir: Path) -> Path:
    """Find the command ``tritonserver``: on the PATH, as in NVIDIA's image, or in `build_dir`.

    Raises
    ------
    HarnessError
        When there is none.
    """
    found = shutil.which("tritonserver")
    own = build_dir / "triton-server" / "bin" / "tritonserver"
    if found is None and not own.is_file():
        raise HarnessError(
            "no Triton server is named, and there is no tritonserver here to start: name servers "
            "that run with --url HOST:PORT, or install one with 'make triton_server'"
        )
    return Path(found) if found else own.absolute()


def server_backends(command: Path) -> dict[str, str]:
    """Triton's backends that a server has, of `harness.triton.repository.SERVER_BACKENDS`.

    Parameters
    ----------
    command
        ``tritonserver``, or a script that names ``--backend-directory``.

    Returns
    -------
    dict
        Name to what it was built for: of ``tensorrt``, whose plans run with the very version that
        built them, the major version of TensorRT.
    """
    start = command.read_bytes()[:4096].decode(errors="replace")
    named = re.search(r"--backend-directory=[\"']?([^\"'\s]+)", start)
    folder = Path(named[1]) if named else command.resolve().parent.parent / "backends"
    found: dict[str, str] = {}
    for name in SERVER_BACKENDS:
        library = folder / name / f"libtriton_{name}.so"
        if library.is_file():
            needs = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes())
            found[name] = f"for TensorRT {needs[1].decode()}" if needs else ""
    return found


@contextmanager
def running_server(command: Path, repository: Repository, log: Path) -> Iterator[TritonServer]:
    """Start a server on a free port of this machine; stop it in the end, whatever that is.

    The context begins when it serves.

    Parameters
    ----------
    command
        ``tritonserver``.
    repository
        What to serve.
    log
        File for what the server prints.

    Raises
    ------
    HarnessError
        When it cannot be started, or ends before it serves.
    """
    port = _free_port()
    # of the Python backend, which leaves them behind when it is killed
    shared = f"triton-{uuid.uuid4().hex}"
    line = [
        *(str(command), *repository.server_arguments),
        *("--allow-http=false", "--allow-metrics=false"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={port}"),
        f"--backend-config=python,shm-region-prefix-name={shared}",
    ]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                line,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - it calls the kernel alone
            )
    except OSError as error:
        raise HarnessError(f"{error.filename}: {error.strerror}") from error
    server = TritonServer(f"127.0.0.1:{port}", process, shared)
    on_leaving(server.stop)
    try:
        _wait_serving(server, port, log)
        yield server
    finally:
        server.stop()


def _wait_serving(server: TritonServer, port: int, log: Path) -> None:
    """Wait until the server listens, which it does when its models are loaded."""
    begin = time.monotonic()
    with progress_bar("the Triton server starts, seconds") as progress:
        while True:
            code = server.process.poll()
            if code is not None:
                raise HarnessError(f"tritonserver ended with exit code {code}; see {log}")
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            if time.monotonic() - begin > START_UP_SECONDS:
                raise HarnessError(
                    f"tritonserver does not serve after {START_UP_SECONDS:.0f} s; see {log}"
                )
            if progress is not None:
                progress(round(time.monotonic() - begin), None)
            time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@app.command()
def install(folder: Annotated[Path, typer.Argument(help="Virtual environment to make.")]) -> None:
    """Install Triton Inference Server with its Python backend."""
    _, version = distribution("onnxruntime")
    if version is None:
        raise HarnessError("ONNX Runtime is not installed, and Triton shall have the same one")
    venv = folder.absolute()
    if venv.exists() and not (venv / "pyvenv.cfg").is_file() and any(venv.iterdir()):
        raise HarnessError(f"{folder} is no virtual environment; name a new folder")
    shutil.rmtree(venv, ignore_errors=True)
    _run(sys.executable, "-m", "venv", venv)
    pip = (
        venv / "bin" / "python",
        "-I",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
    )
    # same results need the same ONNX Runtime
    _run(*pip, "numpy<2", f"onnxruntime=={version}")
    _run(*pip, "--no-deps", PACKAGE)
    (packages,) = (venv / "lib").glob("python3*/site-packages")
    server = packages / "pytriton" / "tritonserver"
    python = "{}.{}".format(*sys.version_info[:2])
    stub = server / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        raise HarnessError(f"{PACKAGE} has no Python backend for Python {python}")
    _check_libraries(stub, python)
    shutil.copy(stub, server / "backends" / "python")
    # the backend's process does not look at PYTHONPATH
    write_atomically(packages / "ssd-resnet34-trt.pth", f"{_ROOT}\n".encode())
    final = venv / "bin" / "tritonserver"
    script = final.with_name("tritonserver.partial")
    write_atomically(script, _SCRIPT.format(venv=venv, server=server).encode())
    script.chmod(0o755)
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    if "--model-repository" not in done.stdout + done.stderr:
        reason = re.sub(r"\s+", " ", done.stderr).strip()
        raise HarnessError(f"the server of {PACKAGE} does not start here: {reason}")
    script.rename(final)
    typer.echo(f"installed {final}")


def _check_libraries(stub: Path, python: str) -> None:
    """Check that the backend's process finds Python's library, which not every Python brings."""
    done = subprocess.run(["ldd", str(stub)], capture_output=True, text=True, check=False)
    missing = [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
    if missing:
        raise HarnessError(
            f"Triton's Python backend needs {', '.join(missing)}: apt-get install libpython{python}"
        )


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], check=False)
    if done.returncode != 0:
        raise HarnessError(f"{command[0]} failed with exit code {done.returncode}; see above")


def main() -> None:
    """Run the command; a user error is one line and exit code 2."""
    run_command(app)


if __name__ == "__main__":
    main()

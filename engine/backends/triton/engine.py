"""A model on a Triton Inference Server, through gRPC: the engine of a client."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.backends.triton.config import DTYPES, MODEL_NAME, check_config
from engine.backends.triton.known import KnownAnswers, check_answers
from engine.backends.triton.memory import (
    CALL_SECONDS,
    Place,
    SentImages,
    SystemMemory,
    Transport,
)
from engine.backends.triton.served import served_model
from engine.errors import EngineError, SessionLostError, one_line
from engine.protocol import (
    DETECTIONS,
    NUM_DETECTIONS,
    InputSpec,
    Session,
    check_batch,
    output_shapes,
)
from engine.support.progress import progress_bar

START_UP_SECONDS = 300.0
"""Longest time for which a server that does not answer, or still loads, is waited for."""

_POLL_SECONDS = 0.5
_SIGN_OF_LIFE_SECONDS = 10.0  # without a result, until the server is asked whether it lives
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a server that is coming up is seen soon
]
_REFUSED = ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED")  # the request, by any server


def import_client() -> Any:
    """Import ``tritonclient.grpc``.

    Raises
    ------
    EngineError
        When it is not installed.
    """
    try:
        import tritonclient.grpc as client
    except ImportError as error:
        raise EngineError(
            "Triton needs its client library: pip install 'tritonclient[grpc]'"
        ) from error
    return client


def load(model: Path, *, device: str, threads: int | None = None) -> TritonEngine:
    """Connect to a server and check that it serves a model.

    A server that is still starting is waited for.

    Parameters
    ----------
    model
        The file that the server serves or was built from, see
        `engine.backends.triton.served.served_model`.
    device
        ``HOST:PORT`` of the server's gRPC endpoint.
    threads
        The server's affair; must be None.

    Raises
    ------
    EngineError
        When the client library is missing, the server does not come up, does not serve the model,
        or serves another one under its name or with a configuration that is known to be wrong.
    """
    if threads is not None:
        raise EngineError("threads are the Triton server's affair")
    if ":" not in device:
        raise EngineError(f"the engine triton is at HOST:PORT of a server, not on {device!r}")
    library = import_client()
    from tritonclient.utils import InferenceServerException

    served = served_model(model)
    client = library.InferenceServerClient(device, channel_args=_CHANNEL)
    try:
        _wait_ready(client, device)
        version = str(client.get_server_metadata(client_timeout=CALL_SECONDS).version)
        config = client.get_model_config(MODEL_NAME, client_timeout=CALL_SECONDS).config
    except InferenceServerException as error:
        raise EngineError(f"the Triton server {device}: {_words(error)}") from error
    known = check_config(config, served, device)
    group = config.instance_group[0]
    gpus = max(1, len(group.gpus))
    transport = _negotiate(client, config)
    manifest = {
        "backend": "triton",
        "version": version,
        "device": device,
        "served_by": config.backend,
        "instances": group.count * gpus,
        "images_through": transport.name,
        "queue_delay_us": config.dynamic_batching.max_queue_delay_microseconds,
        "model": model.name,
        "onnx_sha256": served.onnx_sha256,
        "input": served.input.to_dict(),
        "keep_top_k": served.keep_top_k,
        "outputs": output_shapes(served.keep_top_k),
        "first_label": served.first_label,
        "max_batch": config.max_batch_size,
        "known_answers": len(known.seeds),
        **served.corrections,
    }
    if served.manifest is not None:
        manifest["opt_batch"] = min(served.manifest.opt_batch, config.max_batch_size)
    return TritonEngine(served.input, config.max_batch_size, manifest, client, transport, known)


@dataclass(frozen=True)
class TritonEngine:
    """A model on one server; see `engine.protocol.Engine`. Made by `load`."""

    input_spec: InputSpec
    max_batch: int
    manifest: Mapping[str, object]
    _client: Any = field(repr=False)
    _transport: Transport = field(repr=False)
    _known: KnownAnswers = field(repr=False)

    def session(self) -> TritonSession:
        """Open a session, which keeps every instance of the model busy.

        Its answers to the pictures of `engine.backends.triton.known` that the repository brings
        are checked first, so before every run. What these cannot show, an accuracy run must.

        Raises
        ------
        EngineError
            When one of them is wrong.
        """
        session = TritonSession(self)
        name = f"the Triton server {self.manifest['device']}"
        try:
            check_answers(session, self, self._known, self.max_batch, name)
        except BaseException:
            session.close()
            raise
        if isinstance(self._transport, SystemMemory):
            self._transport.unregister_freed()  # where the pictures were
        return session

    def server_seconds(self) -> Mapping[str, float]:
        """Where the server's time has gone since its start: Triton's own statistics.

        Returns
        -------
        mapping
            ``requests`` that succeeded, and the seconds that they spent, all together: ``total``,
            and of it in ``queue``, ``input`` (copying), ``compute`` and ``output`` (copying).
        """
        (model,) = self._client.get_inference_statistics(
            MODEL_NAME, client_timeout=CALL_SECONDS
        ).model_stats
        found = model.inference_stats
        parts = {
            "total": found.success,
            "queue": found.queue,
            "input": found.compute_input,
            "compute": found.compute_infer,
            "output": found.compute_output,
        }
        seconds = {name: part.ns / 1e9 for name, part in parts.items()}
        return {"requests": found.success.count, **seconds}

    def host_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate memory that the server shares, if it does."""
        return self._transport.host_array(shape, dtype)


@dataclass
class _Request:
    """A batch in flight."""

    images: int
    place: Place
    answer: Future[Any]


class TritonSession(Session):
    """Requests in flight to one server; see `engine.protocol.Session`."""

    def __init__(self, engine: TritonEngine) -> None:
        from tritonclient.grpc import InferInput, InferRequestedOutput

        self._client = engine._client
        self._url = str(engine.manifest["device"])
        self._spec = spec = engine.input_spec
        self._max_batch = engine.max_batch
        self._instances = int(str(engine.manifest["instances"]))
        self._input = functools.partial(InferInput, spec.name, datatype=DTYPES[spec.dtype])
        self._outputs = [InferRequestedOutput(name) for name in (DETECTIONS, NUM_DETECTIONS)]
        self._image_bytes = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        size = engine.max_batch * self._image_bytes
        self._places = [engine._transport.place(size) for _ in range(self.depth)]
        self._free = deque(self._places)
        self._in_flight: deque[_Request] = deque()

    @property
    def depth(self) -> int:
        """One request to run on each instance, and one on its way."""
        return self._instances + 1

    def submit(self, images: Sequence[NDArray[np.generic]]) -> None:
        """Send a request for a batch; see `engine.protocol.Session.submit`."""
        from tritonclient.utils import InferenceServerException

        limit = self._max_batch
        too_large = f"but the server {self._url} takes {limit}"
        count = check_batch(images, self._spec, limit, taker="model", too_large=too_large)
        if not self._free:
            raise EngineError(f"{self.depth} batches are in flight already")
        place = self._free.popleft()
        request = _Request(count, place, Future())
        tensor = self._input(shape=[count, *self._spec.shape])
        region = place.put(images)
        if region is None:
            joined = images[0] if len(images) == 1 else np.concatenate(images)
            tensor.set_data_from_numpy(joined)
        else:
            name, offset = region
            tensor.set_shared_memory(name, count * self._image_bytes, offset)
        try:
            self._client.async_infer(
                MODEL_NAME,
                [tensor],
                functools.partial(_answer, request.answer),
                outputs=self._outputs,
            )
        except InferenceServerException as error:
            raise SessionLostError(f"the Triton server {self._url}: {_words(error)}") from error
        self._in_flight.append(request)

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Wait for the answer to the oldest request; see `engine.protocol.Session.result`."""
        from tritonclient.utils import InferenceServerException

        if not self._in_flight:
            raise EngineError("no batch was submitted")
        request = self._in_flight[0]
        try:
            answer = self._wait(request.answer)
        except InferenceServerException as error:
            message = f"the Triton server {self._url}: {_words(error)}"
            if str(error.status()).removeprefix("StatusCode.") in _REFUSED:
                raise EngineError(message) from error
            raise SessionLostError(message) from error
        self._in_flight.popleft()
        self._free.append(request.place)
        detections, counts = (answer.as_numpy(name) for name in (DETECTIONS, NUM_DETECTIONS))
        if any(one is None or len(one) != request.images for one in (detections, counts)):
            raise EngineError(
                f"the Triton server {self._url} did not answer a batch of {request.images} with as "
                f"many {DETECTIONS} and {NUM_DETECTIONS}"
            )
        detections = detections.copy()
        # a server that joins requests numbers the images of all of them
        detections[..., 0] = np.arange(request.images)[:, None]
        return detections, counts.reshape(request.images)

    def close(self) -> None:
        """Wait for what is in flight, for its memory may be read, and release the memory."""
        for request in self._in_flight:
            with contextlib.suppress(Exception):  # the server may be gone, or have refused it
                request.answer.result(CALL_SECONDS)
        for place in self._places:
            place.close()

    def _wait(self, answer: Future[Any]) -> Any:
        """Wait for an answer as long as the server lives: its host may go without a word."""
        while True:
            try:
                return answer.result(_SIGN_OF_LIFE_SECONDS)
            except FutureTimeoutError:
                self._client.is_server_live(client_timeout=_SIGN_OF_LIFE_SECONDS)


def _words(error: Any) -> str:
    """Return what Triton says of an error in one line."""
    return one_line(error.message() or error)


def _answer(future: Future[Any], result: Any, error: Any) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _negotiate(client: Any, config: Any) -> Transport:
    """Find the shortest way for images that the server takes part in."""
    from tritonclient.grpc import model_config_pb2 as pb

    group = config.instance_group[0]
    # Triton's Python backend takes its inputs from the CPU
    if group.kind == pb.ModelInstanceGroup.KIND_GPU and config.backend != "python":
        from engine.backends.triton.cuda import CudaMemory

        if (memory := CudaMemory.negotiate(client, group.gpus[0] if group.gpus else 0)) is not None:
            return memory
    return SystemMemory.negotiate(client) or SentImages()


def _wait_ready(client: Any, url: str) -> None:
    """Wait until the model is ready, or will never be."""
    from tritonclient.utils import InferenceServerException

    begin = time.monotonic()
    said = False
    with progress_bar(f"waiting for the Triton server {url}, seconds") as progress:
        while True:
            why = "does not answer"
            try:
                client.is_server_live(client_timeout=CALL_SECONDS)
                if client.is_model_ready(MODEL_NAME, client_timeout=CALL_SECONDS):
                    return
                why = _loading(client, url)
            except InferenceServerException as error:
                why = f"does not answer: {_words(error)}"
            waited = time.monotonic() - begin
            if waited > START_UP_SECONDS:
                raise EngineError(f"the Triton server {url} {why} (after {waited:.0f} s)")
            if progress is not None:
                progress(round(waited), round(START_UP_SECONDS))
            elif not said:
                most = f"{START_UP_SECONDS:.0f} s at most"
                sys.stderr.write(f"waiting for the Triton server {url}, {most}: {why}\n")
                said = True
            time.sleep(_POLL_SECONDS)


def _loading(client: Any, url: str) -> str:
    """Say that a server still loads the model.

    Raises
    ------
    EngineError
        When it does not, so that there is nothing to wait for.
    """
    index = client.get_model_repository_index(client_timeout=CALL_SECONDS).models
    states = {model.name: model for model in index}
    if MODEL_NAME not in states:
        raise EngineError(
            f"the Triton server {url} has no model {MODEL_NAME} (it has: "
            f"{', '.join(states) or 'none'}); give it the repository that "
            "'harness triton-repository' writes"
        )
    model = states[MODEL_NAME]
    if model.state == "UNAVAILABLE":
        raise EngineError(
            f"the Triton server {url} cannot serve {MODEL_NAME}: {model.reason or 'not loaded'}"
        )
    return f"is loading {MODEL_NAME}"

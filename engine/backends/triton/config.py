"""What a server's configuration of the model must say, for its clients and who writes it."""

from __future__ import annotations

from typing import Any

from engine.backends.triton.known import KnownAnswers
from engine.backends.triton.served import ServedModel
from engine.errors import EngineError
from engine.protocol import DETECTIONS, NUM_DETECTIONS

MODEL_NAME = "ssd-resnet34"
"""Name of the model on the server."""

KNOWN_PARAMETER = "known_answers"
"""Parameter of the configuration: `engine.backends.triton.known.KnownAnswers.to_text`."""

_ANEW = "write its repository anew with 'harness triton-repository'"

DTYPES = {"float32": "FP32", "int8": "INT8"}
"""Triton's names of the types of images."""


def check_config(config: Any, served: ServedModel, url: str) -> KnownAnswers:
    """Check a server's model configuration against the model that a client means.

    Returns
    -------
    KnownAnswers
        Those in the configuration.

    Raises
    ------
    EngineError
        Naming what differs, or what of it makes answers wrong.
    """

    def same(what: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            raise EngineError(
                f"the Triton server {url} serves another {MODEL_NAME}: its {what} is {theirs}, "
                f"that of {served.path} is {ours}"
            )

    spec = served.input
    for key, value in served.identity().items():
        same(key, config.parameters[key].string_value or "not told", value)
    images = [(i.name, list(i.dims), _type_name(i.data_type)) for i in config.input]
    same("input", images, [(spec.name, list(spec.shape), DTYPES[spec.dtype])])
    missing = {DETECTIONS, NUM_DETECTIONS} - {output.name for output in config.output}
    if missing:
        raise EngineError(
            f"the Triton server {url}: {MODEL_NAME} has no output {', '.join(sorted(missing))}"
        )
    if config.max_batch_size < 1:
        raise EngineError(f"the Triton server {url}: {MODEL_NAME} has no max_batch_size")
    if not config.instance_group:
        raise EngineError(f"the Triton server {url}: {MODEL_NAME} has no instance_group; {_ANEW}")
    known = config.parameters[KNOWN_PARAMETER].string_value
    cuda = config.optimization.cuda
    if cuda.graphs and cuda.output_copy_stream:
        # seen with Triton 2.51; each alone: triton-inference-server/server issues 8325, 8550, 5789
        raise EngineError(
            f"the Triton server {url}: {MODEL_NAME} has graphs and output_copy_stream, with which "
            "Triton sends detections before they are written: take output_copy_stream out of its "
            f"config.pbtxt and configs/*.pbtxt{'' if known else f', or rather {_ANEW}'}"
        )
    if not known:
        raise EngineError(
            f"the Triton server {url}: {MODEL_NAME} has no known answers to check it by; {_ANEW}"
        )
    return KnownAnswers.from_text(known)


def _type_name(data_type: int) -> str:
    from tritonclient.grpc import model_config_pb2 as pb

    return str(pb.DataType.Name(data_type)).removeprefix("TYPE_")

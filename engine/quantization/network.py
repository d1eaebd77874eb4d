"""The network of a detector, from image to heads: cutting it out, hashing and running it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from engine.backends.onnxruntime.session import exact_int8, refusal
from engine.errors import EngineError, one_line
from engine.quantization.placement import Placement
from graph_surgery.protobuf import content, inputs, part, serialized, values_of

if TYPE_CHECKING:
    import onnxruntime


def network_sha256(model: onnx.ModelProto, placement: Placement) -> str:
    """Hash of the nodes and weights between image and heads.

    Neither metadata nor what follows the heads counts, nor in which form the file stores weights.
    """
    digest = sha256()
    network = heads_model(model, placement)
    for node in network.graph.node:
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        digest.update(repr((node.op_type, node.input, node.output, attributes)).encode())
    for tensor in sorted(network.graph.initializer, key=lambda tensor: tensor.name):
        value = values_of(tensor)
        digest.update(repr((tensor.name, value.dtype.str, value.shape)).encode())
        digest.update(content(value))
    return digest.hexdigest()


def heads_model(
    model: onnx.ModelProto, placement: Placement, tensors: Sequence[str] = ()
) -> onnx.ModelProto:
    """Cut a detector off behind its heads.

    Parameters
    ----------
    tensors
        Outputs of the result; none: the heads.
    """
    images = [value for value in inputs(model) if value.name == placement.image]
    return part(model, images, tensors or placement.heads)


def open_session(
    model: onnx.ModelProto, threads: int | None = None, *, optimise: bool = True
) -> onnxruntime.InferenceSession:
    """Run a model in ONNX Runtime.

    Parameters
    ----------
    threads
        Threads of one run; None: one for each CPU of this process.
    optimise
        Whether ONNX Runtime may change the graph.

    Raises
    ------
    EngineError
        When ONNX Runtime refuses the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # large outputs that live longer than a run fragment an arena, which never gives back
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    try:
        with serialized(model) as (given, entries):
            for key, value in {**exact_int8(), **entries}.items():
                options.add_session_config_entry(key, value)
            return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT's exceptions share no base class but Exception
        raise EngineError(refusal(error)) from error


def run(
    session: onnxruntime.InferenceSession,
    outputs: Sequence[str],
    image: str,
    batch: NDArray[np.generic],
    where: str,
) -> list[NDArray[np.float32]]:
    """Run a session on a batch.

    Parameters
    ----------
    outputs
        Names of the tensors to return.
    image
        Name of the input.
    batch
        What it takes.
    where
        The first image of the batch, for a message.

    Raises
    ------
    EngineError
        When ONNX Runtime fails.
    """
    try:
        found: list[NDArray[np.float32]] = session.run(list(outputs), {image: batch})
    except Exception as error:  # ORT's exceptions share no base class but Exception
        raise EngineError(f"ONNX Runtime failed on {where}: {one_line(error)}") from error
    return found

"""A small detector, images for it and its calibration, shared by the tests of quantisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from engine.data.preprocessed import PreprocessedSet
from engine.protocol import InputSpec
from engine.quantization.network import open_session
from graph_surgery.files import load, save
from graph_surgery.replace import insert_nms

SPEC = InputSpec("image", (3, 400, 400), "float32")


def write_surgered(exported: Path, path: Path) -> Path:
    save(insert_nms(load(exported)).model, path)
    return path


def write_images(directory: Path, images: np.ndarray) -> PreprocessedSet:
    names = tuple(f"{index:03}.jpg" for index in range(len(images)))
    for name, image in zip(names, images, strict=True):
        np.save(directory / f"{name}.npy", image)
    return PreprocessedSet(directory, names, replace(SPEC, shape=images.shape[1:]), {})


def activations(model: onnx.ModelProto, feed: np.ndarray, *, optimise: bool = True) -> dict:
    """Every tensor that a node outside NMS_OPT_TRT makes, from ONNX Runtime."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    names = [n for node in new.graph.node if not node.domain for n in node.output]
    del new.graph.output[:]
    new.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return {model.graph.input[0].name: feed} | dict(
        zip(names, run(new, feed, names, optimise=optimise), strict=True)
    )


def run(model: onnx.ModelProto, feed: np.ndarray, names: list[str], *, optimise: bool = True):
    """The named tensors; they become outputs where they are not."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    known = {value.name for value in new.graph.output}
    new.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    session = open_session(new, optimise=optimise)  # whose sums do not saturate on any processor
    return session.run(names, {model.graph.input[0].name: feed})


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def heads(model):
    (nms,) = (node for node in model.graph.node if node.op_type == "NMS_OPT_TRT")
    return list(nms.input[:-1])


def to_int8(model, images):
    scale = np.float32({entry.key: entry.value for entry in model.metadata_props}["input_scale"])
    return np.clip(np.rint(images / scale), -127, 127).astype(np.int8)


def snr_db(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    a = np.concatenate([x.astype(np.float64).ravel() for x in reference])
    b = np.concatenate([x.astype(np.float64).ravel() for x in other])
    return float(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))

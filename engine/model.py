"""A detector in an ONNX file, loaded once and handed on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import onnx

from engine.errors import EngineError
from engine.protocol import (
    DETECTION_FIELDS,
    DETECTIONS,
    NUM_DETECTIONS,
    TARGET_KEY,
    InputSpec,
    input_scale,
)
from engine.support.documents import parse_json
from engine.support.external import model_sha256
from graph_surgery.errors import SurgeryError
from graph_surgery.files import load
from graph_surgery.names import NAMES_KEY, SIZE_GUESS_KEY, first_label
from graph_surgery.nms_function import DOMAIN, OP_TYPE, VERSION_2, VERSIONS

_DTYPES: dict[int, Literal["float32", "int8"]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.INT8: "int8",
}


@dataclass(frozen=True, eq=False)
class Detector:
    """An ONNX file and what is asked of it again and again. Made by `load_detector`.

    Attributes
    ----------
    path
        The file.
    model
        Its content, as `graph_surgery.files.load` reads it. Nobody changes it.
    """

    path: Path
    model: onnx.ModelProto = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, and of the files with its data."""
        return model_sha256(self.path)

    @cached_property
    def structure_sha256(self) -> str:
        """SHA-256 of nodes, attributes, and names, types and shapes of constants, not values."""
        digest = hashlib.sha256()
        for node in self.model.graph.node:
            attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
            what = node.domain, node.op_type, list(node.input), list(node.output), attributes
            digest.update(repr(what).encode())
        for tensor in sorted(self.model.graph.initializer, key=lambda tensor: tensor.name):
            digest.update(repr((tensor.name, tensor.data_type, list(tensor.dims))).encode())
        return digest.hexdigest()

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """Metadata properties of the model."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @cached_property
    def input(self) -> InputSpec:
        """The image input.

        Raises
        ------
        EngineError
            When there is not one [N, 3, H, W] with fixed H and W, float32 or int8 with its scale in
            the metadata.
        """
        image = self._image
        name, tensor = image.name, image.type.tensor_type
        kind = _DTYPES.get(tensor.elem_type)
        if kind is None:
            found = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise EngineError(f"{self.path}: input {name!r} is {found}; float32 or int8 expected")
        sizes = [int(size.dim_value) for size in tensor.shape.dim[1:]]
        if len(sizes) != 3 or sizes[0] != 3 or not all(sizes):
            raise EngineError(f"{self.path}: input {name!r} is not [N, 3, H, W] with fixed H and W")
        channels, height, width = sizes
        scale = input_scale(self.metadata, self.path) if kind == "int8" else None
        return InputSpec(name, (channels, height, width), kind, scale)

    @cached_property
    def batch(self) -> int | None:
        """Batch size that is fixed in the graph; None: any."""
        dims = self._image.type.tensor_type.shape.dim
        return (dims[0].dim_value or None) if dims else None

    @cached_property
    def keep_top_k(self) -> int | None:
        """Rows of detections for each image; None where the outputs do not say."""
        sizes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in self.model.graph.output
        }
        match sizes.get(DETECTIONS), sizes.get(NUM_DETECTIONS):
            case [_, int(rows), int(fields)], [_] if rows and fields == DETECTION_FIELDS:
                return rows
        return None

    @cached_property
    def _nms(self) -> Mapping[str, int]:
        """Whole numbers among the attributes of NMS_OPT_TRT; none without that node."""
        nodes = (node for node in self.model.graph.node if node.op_type == OP_TYPE)
        return {one.name: one.i for node in nodes for one in node.attribute}

    @property
    def classes(self) -> int | None:
        """Classes that NMS_OPT_TRT detects; None without that node."""
        classes, background = self._nms.get("numClasses"), self._nms.get("backgroundLabelId")
        return classes and classes - (background in (0, classes - 1))

    @property
    def first_label(self) -> int:
        """Label of the first class, 0 or 1; see `graph_surgery.names.first_label`."""
        return first_label(self.metadata, self._nms.get("backgroundLabelId"))

    @property
    def quantized(self) -> bool:
        """Whether any of it is INT8."""
        return any(node.op_type == "QuantizeLinear" for node in self.model.graph.node)

    def require_any_engine(self) -> None:
        """Raise EngineError when the file is for ONNX Runtime on CPUs alone."""
        if TARGET_KEY in self.metadata:
            raise EngineError(
                f"{self.path}: INT8 for ONNX Runtime on a CPU; of this engine is what 'engine "
                "quantize' writes without --target cpu"
            )

    def require_version_1(self, engine: str) -> None:
        """Raise EngineError when NMS_OPT_TRT is of version 2, which that engine does not run."""
        for node in self.model.graph.node:
            values = {attribute.name: attribute for attribute in node.attribute}
            version = values["plugin_version"].s if "plugin_version" in values else b""
            if (node.domain, node.op_type, version) == (DOMAIN, OP_TYPE, VERSIONS[1].encode()):
                raise EngineError(
                    f"{self.path}: {VERSION_2} is not known to {engine}; use --engine onnxruntime "
                    "or tensorrt"
                )

    def require_dynamic_batch(self) -> None:
        """Raise EngineError when the batch is fixed."""
        if self.batch is not None:
            raise EngineError(
                f"{self.path}: the batch of input {self._image.name!r} is fixed at {self.batch}; "
                "export the model with a dynamic batch"
            )

    @property
    def _image(self) -> onnx.ValueInfoProto:
        constants = {tensor.name for tensor in self.model.graph.initializer}
        inputs = [value for value in self.model.graph.input if value.name not in constants]
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs)
            raise EngineError(
                f"{self.path}: one image input expected, found {len(inputs)}: {names}"
            )
        image: onnx.ValueInfoProto = inputs[0]
        return image


def class_names(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the labels 1, 2… in the metadata of a model; none where it does not say."""
    try:
        names = parse_json(metadata.get(NAMES_KEY, "[]"))
    except ValueError:
        return ()
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if listed else ()


def size_guess(metadata: Mapping[str, str]) -> str:
    """Size of the image, HEIGHTxWIDTH, where the export of the weights guessed it; else empty."""
    guess = metadata.get(SIZE_GUESS_KEY, "")
    return guess if re.fullmatch("[0-9]{1,5}x[0-9]{1,5}", guess) else ""


def load_detector(path: Path) -> Detector:
    """Read an ONNX file.

    Raises
    ------
    EngineError
        When it is missing, damaged or invalid.
    """
    try:
        return Detector(path, load(path))
    except SurgeryError as error:
        raise EngineError(str(error)) from error

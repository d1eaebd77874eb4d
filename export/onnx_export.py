"""A detector with its postprocess to one ONNX file."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.architecture import Network
from export.checkpoint import Checkpoint
from export.config import Config
from export.errors import ExportError
from graph_surgery.names import DETECTOR_KEY, FIRST_LABEL_KEY, NAMES_KEY, SIZE_GUESS_KEY

OPSET = 18
DETECTION_OUTPUTS = ("detections", "num_detections")


def head_outputs(config: Config) -> list[str]:
    """Extra outputs that the check reads and the file does not keep: the head convolutions'."""
    levels = range(len(config.levels))
    return [f"{kind}_{level}" for kind in ("loc", "conf") for level in levels]


class Detector(nn.Module):
    """Image to detections, and the head tensors for the check."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = fold_batch_norms(model)
        self.postprocess = model.postprocess()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, H, W] to detections, num_detections, loc of all levels, conf of all levels."""
        loc, conf = self.model(image)
        return *self.postprocess(loc, conf), *loc, *conf


def fold_batch_norms(model: Network) -> Network:
    """Return a copy in eval mode in which every BatchNorm is folded into its convolution."""
    model = deepcopy(model).eval()
    for module in list(model.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX for the two custom operators of `postprocess`, and for the division of indices."""
    import onnxscript

    op: Any = onnxscript.opset18  # its stubs do not know that Python numbers are promoted

    def topk(values: Any, k: int) -> Any:
        # ONNX TopK: of equal values the one with the lower index comes first.
        return op.TopK(values, op.Constant(value_ints=[k]), axis=-1)

    def nms(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
        shape = op.Shape(scores)
        selected = op.NonMaxSuppression(
            boxes,
            scores,
            op.Gather(shape, op.Constant(value_ints=[2])),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )  # [kept, 3]: set, row, box
        ones = op.Expand(op.Constant(value_int=1), op.Shape(selected, start=0, end=1))
        zeros = op.Expand(op.Constant(value_int=0), shape)
        return op.Cast(op.ScatterND(zeros, selected, ones), to=onnx.TensorProto.BOOL)

    def divide(index: Any, count: int) -> Any:
        return op.Div(index, op.Constant(value_int=count))  # no index is negative

    ops = torch.ops.detectors
    return {
        ops.stable_topk.default: topk,
        ops.greedy_nms.default: nms,
        torch.ops.aten.floor_divide.default: divide,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress chatter off the user's screen."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def export_detector(detector: Detector) -> onnx.ModelProto:
    """Export to ONNX opset 18 with a dynamic batch.

    Returns
    -------
    Input ``image`` float32 [batch, 3, H, W]; outputs ``detections`` float32 [batch, keep, 7],
    ``num_detections`` int32 [batch] and the `head_outputs`. Checked by onnx.checker.

    Raises
    ------
    ExportError
        When the exported graph is not a valid ONNX model.
    """
    config = detector.model.config
    with _quiet():
        program = torch.onnx.export(
            detector,
            (torch.zeros(2, 3, *config.image_shape),),
            input_names=["image"],
            output_names=[*DETECTION_OUTPUTS, *head_outputs(config)],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=_translations(),
            verbose=False,
        )
    if program is None:
        raise ExportError("the exporter returned no model")
    model = program.model_proto
    for node in model.graph.node:  # the exporter's trace of Python files: paths of this machine
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is invalid: {error}") from error
    return model


def without_heads(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the outputs that only the check needs, and the nodes that made only them."""
    slim = onnx.utils.Extractor(model).extract_model(["image"], [*DETECTION_OUTPUTS])
    slim.producer_name, slim.producer_version = model.producer_name, model.producer_version
    onnx.checker.check_model(slim, full_check=True)
    return slim


def metadata(
    checkpoint: Checkpoint, config: Config, names: Sequence[str], size_guess: str = ""
) -> dict[str, str]:
    """Metadata of a file: what it is made from, its class names if it has any, a guessed size."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("ssd-resnet34-trt")
    except PackageNotFoundError:  # run from a checkout
        ours = "not installed"
    return {
        DETECTOR_KEY: checkpoint.architecture.name,
        **({} if checkpoint.architecture.background else {FIRST_LABEL_KEY: "0"}),
        checkpoint.architecture.config_key: config.to_json(),
        "weights_sha256": checkpoint.sha256,
        **({"weights_entry": checkpoint.keys} if checkpoint.keys else {}),
        "ssd_resnet34_trt_version": ours,
        **({NAMES_KEY: json.dumps(names)} if names else {}),
        **({SIZE_GUESS_KEY: size_guess} if size_guess else {}),
    }


def check_record(path: Path, facts: Mapping[str, str]) -> None:
    """Refuse a file whose metadata tells that it was made from something else.

    Raises
    ------
    ExportError
        When it has other metadata, or is no ONNX file.
    """
    found = None
    with contextlib.suppress(DecodeError, OSError):
        model = onnx.load(path, load_external_data=False)
        found = {entry.key: entry.value for entry in model.metadata_props}
    if found != facts:
        raise ExportError(f"{path}: exists already, and is another: remove it or pass --force")

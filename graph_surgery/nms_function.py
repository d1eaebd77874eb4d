"""NMS_OPT_TRT: the ONNX model-local function whose body defines the operator.

Any ONNX runtime inlines the body; an engine that has a kernel of this name takes its kernel.

Inputs, for L levels of h_i x w_i cells with A_i priors each, P = sum of A_i * h_i * w_i: ``loc_0``
to ``loc_{L-1}`` [N, A_i * 4, h_i, w_i] and ``conf_0`` to ``conf_{L-1}`` [N, A_i * C, h_i, w_i],
float32 or float16, coordinate-major and class-major; ``priors`` float32 [2, P * 4, 1], plane 0
xmin, ymin, xmax, ymax of each prior, plane 1 its four variances.

Outputs: ``detections`` float32 [N, keepTopK, 7], rows of (image index, ymin, xmin, ymax, xmax,
score, label), and ``num_detections`` int32 [N].

What the body settles beyond the rules of the plugin it stands for:

* A score is void (-1) for the background class and for a prior with a NaN or infinite logit or
  decoded coordinate; a void score is never above the threshold, which lies in [0, 1].
* A box whose decoded width or height is not positive has area zero: its IoU with any box is 0,
  so it never suppresses and is never suppressed. Its row holds its corners as decoded.
* Corners are clipped to [0, 1] after the last selection, so suppression sees unclipped boxes.

Version 2, for detectors as RetinaNet, adds three attributes: a cut of each level's candidates over
all classes, a clip before suppression, and a bound of the stretch; see `NmsAttributes`. What it
settles:

* A candidate of a level's cut is void or not as above, and above the threshold, before it is
  counted: void scores take no place of another.
* Infinite deltas of a width or height are bounded as others are, and then no reason for a void.
* Suppression is within a class, over all levels: in order of score, of equal ones the lower prior
  first, so the finer level's.
* Rows of equal score come by class, then prior, as in version 1.

`nms_body` has the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from graph_surgery.errors import SurgeryError
from graph_surgery.nms_body import body

DOMAIN = "trt.plugins"
OP_TYPE = "NMS_OPT_TRT"
DOMAIN_VERSION = 1

MIN_OPSET = 18
"""The newest of the body's operators is Split with num_outputs."""

MIN_IR_VERSION = 8
"""First ONNX IR with model-local functions."""

OUTPUTS = ("detections", "num_detections")

VERSIONS = ("1", "2")
"""Values of ``plugin_version``: NVIDIA's attributes alone, and with those of ours."""

OURS = ("levelTopK", "clipBeforeNms", "bboxXformClip")
"""Attributes behind NVIDIA's, of version 2. A node carries them where one is not its default."""

VERSION_2 = f"{OP_TYPE} version {VERSIONS[1]} ({', '.join(OURS)})"
"""What messages call the later one."""

CENTER_SIZE = 1
"""codeType: (dx, dy, dw, dh) scaled by the variances move a prior's centre and stretch its size."""


@dataclass(frozen=True)
class NmsAttributes:
    """The attributes of an NMS_OPT_TRT node, under NVIDIA's names.

    Attributes
    ----------
    shareLocation
        1: one box per prior, shared by the classes.
    varianceEncodedInTarget
        0: deltas are multiplied by the variance plane of the priors.
    backgroundLabelId
        Class that never becomes a detection; -1: none.
    numClasses
        C, with background.
    topK
        Candidates per class that enter suppression.
    keepTopK
        Rows per image.
    confidenceThreshold, nmsThreshold
        In [0, 1]. A candidate's score is larger; a suppressed box's IoU is larger.
    inputOrder
        Index of the first loc input, the first conf input and the priors: (0, L, 2 L).
    confSigmoid, confSoftmax
        0 and 1: scores are the softmax of the logits over the classes; 1 and 0: the sigmoid of
        each logit. The layout of the inputs is the same.
    isNormalized
        1: coordinates are fractions of the image, areas plain products.
    codeType
        1: CENTER_SIZE.
    numLayers
        L, levels.
    levelTopK
        Before suppression, candidates of a level that remain: the best over all its classes and
        priors, of equal scores the lower class, then prior. topK caps nothing then, and is
        L * levelTopK. 0: no such cut.
    clipBeforeNms
        1: boxes are clipped to [0, 1] before suppression, so that IoU is that of clipped boxes.
    bboxXformClip
        Upper bound of dw and dh times their variance, natural logarithm of the largest stretch;
        0: none. Named as in Detectron, where it is log(1000/16), so in torchvision.

    Raises
    ------
    SurgeryError
        For a value that the operator's definition does not cover.
    """

    numClasses: int  # noqa: N815
    topK: int  # noqa: N815
    keepTopK: int  # noqa: N815
    confidenceThreshold: float  # noqa: N815
    nmsThreshold: float  # noqa: N815
    backgroundLabelId: int  # noqa: N815
    numLayers: int  # noqa: N815
    inputOrder: tuple[int, int, int]  # noqa: N815
    shareLocation: int = 1  # noqa: N815
    varianceEncodedInTarget: int = 0  # noqa: N815
    confSigmoid: int = 0  # noqa: N815
    confSoftmax: int = 1  # noqa: N815
    isNormalized: int = 1  # noqa: N815
    codeType: int = CENTER_SIZE  # noqa: N815
    levelTopK: int = 0  # noqa: N815
    clipBeforeNms: int = 0  # noqa: N815
    bboxXformClip: float = 0.0  # noqa: N815

    @property
    def version(self) -> int:
        """Version of the operator that these attributes need."""
        return 2 if any(getattr(self, name) for name in OURS) else 1

    @property
    def written(self) -> dict[str, Any]:
        """What a node carries: version 1 is as it was before there were attributes of ours."""
        left_out = OURS if self.version == 1 else ()
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        return values | {"plugin_version": str(self.version), "plugin_namespace": ""}

    def __post_init__(self) -> None:
        levels = self.numLayers
        fixed = {
            "inputOrder": (0, levels, 2 * levels),
            "shareLocation": 1,
            "varianceEncodedInTarget": 0,
            "isNormalized": 1,
            "codeType": CENTER_SIZE,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise SurgeryError(
                    f"{OP_TYPE}: {name}={getattr(self, name)} is not supported, only {value}"
                )
        if (self.confSigmoid, self.confSoftmax) not in ((0, 1), (1, 0)):
            raise SurgeryError(
                f"{OP_TYPE}: confSigmoid={self.confSigmoid} with confSoftmax={self.confSoftmax} "
                "is not supported, one must be 0 and the other 1"
            )
        for name in ("numClasses", "topK", "keepTopK", "numLayers"):
            if getattr(self, name) < 1:
                raise SurgeryError(f"{OP_TYPE}: {name}={getattr(self, name)} must be at least 1")
        for name in ("confidenceThreshold", "nmsThreshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise SurgeryError(f"{OP_TYPE}: {name}={getattr(self, name)} is not in [0, 1]")
        if not -1 <= self.backgroundLabelId < self.numClasses:
            raise SurgeryError(
                f"{OP_TYPE}: backgroundLabelId={self.backgroundLabelId} is no class of "
                f"{self.numClasses} and not -1"
            )
        if self.clipBeforeNms not in (0, 1):
            raise SurgeryError(f"{OP_TYPE}: clipBeforeNms={self.clipBeforeNms} is not 0 or 1")
        if not 0 <= self.bboxXformClip < math.inf:
            raise SurgeryError(
                f"{OP_TYPE}: bboxXformClip={self.bboxXformClip} is no bound, which is finite and "
                "positive, and not 0"
            )
        if self.levelTopK < 0:
            raise SurgeryError(f"{OP_TYPE}: levelTopK={self.levelTopK} is negative")
        if self.levelTopK and self.topK != levels * self.levelTopK:
            raise SurgeryError(
                f"{OP_TYPE}: topK={self.topK} with levelTopK={self.levelTopK} and {levels} levels "
                f"is not supported, only {levels * self.levelTopK}, which caps nothing"
            )


def input_names(num_layers: int) -> list[str]:
    """Formal inputs of the function: loc of every level, conf of every level, priors."""
    loc = [f"loc_{i}" for i in range(num_layers)]
    conf = [f"conf_{i}" for i in range(num_layers)]
    return [*loc, *conf, "priors"]


def add_nms(
    graph: gs.Graph, inputs: Sequence[gs.Tensor], attributes: NmsAttributes, size: int | str
) -> list[gs.Tensor]:
    """Add the node, with all attributes, and its definition to a graph; its outputs.

    Parameters
    ----------
    inputs
        Tensors in the order of `input_names`.
    size
        N.
    """
    add_definition(graph, attributes)
    shapes = [size, attributes.keepTopK, 7], [size]
    outputs = map(gs.Variable, OUTPUTS, map(np.dtype, (np.float32, np.int32)), shapes)
    made: list[gs.Tensor] = graph.layer(
        op=OP_TYPE,
        name=OP_TYPE,
        domain=DOMAIN,
        inputs=list(inputs),
        outputs=list(outputs),
        attrs=dict(sorted(attributes.written.items())),
    )
    return made


def add_definition(graph: gs.Graph, attributes: NmsAttributes) -> None:
    """Add the operator's definition to a graph; see `nms_function`."""
    function = nms_function(attributes, graph.opset)
    graph.functions.append(OnnxImporter.import_function(function))
    graph.import_domains.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def plugin_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model without the function that defines NMS_OPT_TRT.

    What runs it must have the operator. TensorRT's parser, up to 10.6 at least, takes the
    definition where there is one, whatever plugin is registered. Nothing else changes.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.functions[:]
    copy.functions.extend(f for f in model.functions if (f.domain, f.name) != (DOMAIN, OP_TYPE))
    return copy


def nms_function(attributes: NmsAttributes, opset: int) -> onnx.FunctionProto:
    """Write the operator's definition for nodes with these attributes.

    It depends on their version, the number of levels, confSigmoid and whether levelTopK cuts;
    `opset` is the version of the standard operators, that of the model which will hold the
    function, at least `MIN_OPSET`.

    Raises
    ------
    SurgeryError
        For an older opset.
    """
    if opset < MIN_OPSET:
        raise SurgeryError(f"{OP_TYPE} needs opset {MIN_OPSET} or later, not {opset}")
    inputs = input_names(attributes.numLayers)
    nodes = body(
        inputs,
        sigmoid=attributes.confSigmoid == 1,
        version=attributes.version,
        by_level=attributes.levelTopK > 0,
    )
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {OP_TYPE} <{", ".join(attributes.written)}> ({", ".join(inputs)}) => ({", ".join(OUTPUTS)})
    {{{nodes}}}
    """
    return onnx.parser.parse_function(text)

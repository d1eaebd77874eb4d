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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from graph_surgery.errors import SurgeryError

DOMAIN = "trt.plugins"
OP_TYPE = "NMS_OPT_TRT"
DOMAIN_VERSION = 1

MIN_OPSET = 18
"""The newest of the body's operators is Split with num_outputs."""

MIN_IR_VERSION = 8
"""First ONNX IR with model-local functions."""

OUTPUTS = ("detections", "num_detections")

PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}
"""What lets TensorRT see a plugin in the node."""

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
    add_definition(graph, attributes.numLayers, sigmoid=attributes.confSigmoid == 1)
    shapes = [size, attributes.keepTopK, 7], [size]
    outputs = map(gs.Variable, OUTPUTS, map(np.dtype, (np.float32, np.int32)), shapes)
    made: list[gs.Tensor] = graph.layer(
        op=OP_TYPE,
        name=OP_TYPE,
        domain=DOMAIN,
        inputs=list(inputs),
        outputs=list(outputs),
        attrs=dict(sorted((asdict(attributes) | PLUGIN_ATTRIBUTES).items())),
    )
    return made


def add_definition(graph: gs.Graph, num_layers: int, *, sigmoid: bool) -> None:
    """Add the operator's definition to a graph; see `nms_function`."""
    function = nms_function(num_layers, graph.opset, sigmoid=sigmoid)
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


def nms_function(num_layers: int, opset: int, *, sigmoid: bool = False) -> onnx.FunctionProto:
    """Write the operator's definition for `num_layers` levels.

    Parameters
    ----------
    num_layers
        L.
    opset
        Version of the standard operators, that of the model which will hold the function;
        at least `MIN_OPSET`.
    sigmoid
        The definition for nodes with confSigmoid=1; otherwise for those with confSoftmax=1.

    Raises
    ------
    SurgeryError
        For an older opset.
    """
    if opset < MIN_OPSET:
        raise SurgeryError(f"{OP_TYPE} needs opset {MIN_OPSET} or later, not {opset}")
    inputs = input_names(num_layers)
    attributes = [*NmsAttributes.__dataclass_fields__, *PLUGIN_ATTRIBUTES]
    flatten = "\n".join(
        f"{name}_rows = Reshape ({name}, {name[:4].rstrip('_')}_shape)" for name in inputs[:-1]
    )
    loc_rows = ", ".join(f"{name}_rows" for name in inputs[:num_layers])
    conf_rows = ", ".join(f"{name}_rows" for name in inputs[num_layers:-1])
    activation = "Sigmoid (logits)" if sigmoid else "Softmax <axis = 1> (logits)"
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {OP_TYPE} <{", ".join(attributes)}> ({", ".join(inputs)}) => (detections, num_detections)
    {{
      one = Constant <value_ints = [1]> ()
      minus_one = Constant <value_ints = [-1]> ()
      zero_f = Constant <value_float = 0.0> ()
      one_f = Constant <value_float = 1.0> ()
      half_f = Constant <value_float = 0.5> ()
      void_f = Constant <value_float = -1.0> ()
      background = Constant <value_int: int = @backgroundLabelId> ()
      score_threshold = Constant <value_float: float = @confidenceThreshold> ()
      iou_threshold = Constant <value_float: float = @nmsThreshold> ()
      num_classes_scalar = Constant <value_int: int = @numClasses> ()
      num_classes = Reshape (num_classes_scalar, one)
      top_k_scalar = Constant <value_int: int = @topK> ()
      top_k = Reshape (top_k_scalar, one)
      keep_top_k_scalar = Constant <value_int: int = @keepTopK> ()
      keep_top_k = Reshape (keep_top_k_scalar, one)

      # Levels joined: deltas [N, 4, P], logits [N, C, P].
      zero = Constant <value_ints = [0]> ()
      loc_shape = Constant <value_ints = [0, 4, -1]> ()
      conf_shape = Concat <axis = 0> (zero, num_classes, minus_one)
      {flatten}
      loc_joined = Concat <axis = 2> ({loc_rows})
      conf_joined = Concat <axis = 2> ({conf_rows})
      deltas = Cast <to = 1> (loc_joined)
      logits = Cast <to = 1> (conf_joined)

      # CENTER_SIZE: priors and boxes ltrb, [4, P] and [N, 4, P].
      prior_shape = Constant <value_ints = [2, -1, 4]> ()
      prior_rows = Reshape (priors, prior_shape)
      prior_planes = Transpose <perm = [0, 2, 1]> (prior_rows)
      ltrb_index = Constant <value_int = 0> ()
      variance_index = Constant <value_int = 1> ()
      prior_ltrb = Gather <axis = 0> (prior_planes, ltrb_index)
      variances = Gather <axis = 0> (prior_planes, variance_index)
      prior_lt, prior_rb = Split <axis = 0, num_outputs = 2> (prior_ltrb)
      prior_size = Sub (prior_rb, prior_lt)
      prior_sum = Add (prior_lt, prior_rb)
      prior_centre = Mul (prior_sum, half_f)
      scaled = Mul (deltas, variances)
      move, log_stretch = Split <axis = 1, num_outputs = 2> (scaled)
      shift = Mul (move, prior_size)
      centre = Add (shift, prior_centre)
      stretch = Exp (log_stretch)
      size = Mul (stretch, prior_size)
      half_size = Mul (size, half_f)
      lt = Sub (centre, half_size)
      rb = Add (centre, half_size)
      ltrb = Concat <axis = 1> (lt, rb)

      # Scores [N, C, P], void where they cannot count. x * 0 is 0 for finite x alone, else NaN.
      probability = {activation}
      logits_0 = Mul (logits, zero_f)
      ltrb_0 = Mul (ltrb, zero_f)
      logits_check = ReduceSum <keepdims = 1> (logits_0, one)
      ltrb_check = ReduceSum <keepdims = 1> (ltrb_0, one)
      check = Add (logits_check, ltrb_check)
      finite = Equal (check, zero_f)
      zero_scalar = Constant <value_int = 0> ()
      one_scalar = Constant <value_int = 1> ()
      classes = Range (zero_scalar, num_classes_scalar, one_scalar)
      class_shape = Constant <value_ints = [1, -1, 1]> ()
      class_column = Reshape (classes, class_shape)
      is_background = Equal (class_column, background)
      is_foreground = Not (is_background)
      counts = And (finite, is_foreground)
      scores = Where (counts, probability, void_f)

      # The K = min(topK, P) best of each class; of equal scores the lower prior.
      num_priors = Shape <start = 2> (scores)
      k = Min (top_k, num_priors)
      class_scores, class_priors = TopK <axis = 2> (scores, k)
      candidate_shape = Constant <value_ints = [0, -1, 1]> ()
      candidate_priors = Reshape (class_priors, candidate_shape)
      ltrb_rows = Transpose <perm = [0, 2, 1]> (ltrb)
      candidates = GatherND <batch_dims = 1> (ltrb_rows, candidate_priors)

      # Suppression, each class of each image a batch of its own: boxes [N * C, K, 4]. Raising the
      # far corner to the near one makes an inverted box empty; the operator would flip it.
      near, far = Split <axis = 2, num_outputs = 2> (candidates)
      far_or_near = Max (near, far)
      boxes = Concat <axis = 2> (near, far_or_near)
      four = Constant <value_ints = [4]> ()
      nms_boxes_shape = Concat <axis = 0> (minus_one, k, four)
      nms_boxes = Reshape (boxes, nms_boxes_shape)
      nms_scores_shape = Concat <axis = 0> (minus_one, one, k)
      nms_scores = Reshape (class_scores, nms_scores_shape)
      selected = NonMaxSuppression (nms_boxes, nms_scores, k, iou_threshold, score_threshold)
      row_and_rank = Constant <value_ints = [0, 2]> ()
      kept = Gather <axis = 1> (selected, row_and_rank)

      # Scores of the kept, void elsewhere, [N, C * K] in the order class, rank in the class.
      flat_scores_shape = Concat <axis = 0> (minus_one, k)
      flat_scores = Reshape (class_scores, flat_scores_shape)
      kept_scores = GatherND (flat_scores, kept)
      flat_shape = Shape (flat_scores)
      nothing = ConstantOfShape <value = float[1] {{-1.0}}> (flat_shape)
      survivors = ScatterND (nothing, kept, kept_scores)
      class_scores_shape = Shape (class_scores)
      survivors_by_class = Reshape (survivors, class_scores_shape)
      survivors_of_image = Flatten <axis = 1> (survivors_by_class)

      # The keepTopK best of the image; padding makes sure that there are as many to choose from.
      no_pad = Constant <value_ints = [0, 0, 0]> ()
      pads = Concat <axis = 0> (no_pad, keep_top_k)
      padded = Pad (survivors_of_image, pads, void_f)
      best_scores, best = TopK <axis = 1> (padded, keep_top_k)
      used = Greater (best_scores, score_threshold)
      num_used = Cast <to = 6> (used)
      num_detections = ReduceSum <keepdims = 0> (num_used, one)

      # Rows.
      slot = Where (used, best, zero_scalar)
      slot_column = Unsqueeze (slot, minus_one)
      best_ltrb = GatherND <batch_dims = 1> (candidates, slot_column)
      to_tlbr = Constant <value_ints = [1, 0, 3, 2]> ()
      best_tlbr = Gather <axis = 2> (best_ltrb, to_tlbr)
      clipped = Clip (best_tlbr, zero_f, one_f)
      used_column = Unsqueeze (used, minus_one)
      corners = Where (used_column, clipped, zero_f)
      used_scores = Where (used, best_scores, zero_f)
      score_column = Unsqueeze (used_scores, minus_one)
      class = Div (slot, k)
      class_f = Cast <to = 1> (class)
      label = Where (used, class_f, void_f)
      label_column = Unsqueeze (label, minus_one)
      batch = Shape <start = 0, end = 1> (best_scores)
      batch_scalar = Squeeze (batch)
      images = Range (zero_scalar, batch_scalar, one_scalar)
      image_shape = Constant <value_ints = [-1, 1, 1]> ()
      image_rows = Reshape (images, image_shape)
      image_rows_f = Cast <to = 1> (image_rows)
      column_shape = Shape (score_column)
      image_column = Expand (image_rows_f, column_shape)
      detections = Concat <axis = 2> (image_column, corners, score_column, label_column)
    }}
    """
    return onnx.parser.parse_function(text)

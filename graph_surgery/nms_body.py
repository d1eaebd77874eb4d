"""The text of NMS_OPT_TRT's definition, in ONNX's textual syntax and standard operators.

Three bodies of one operator share their pieces: version 1; version 2 without a cut by level, which
is version 1 with a bound of the stretch and a clip before suppression; and version 2 with a cut.
Attributes choose the rest within a body. The nodes of version 1, and their order, never change:
files hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

_PARAMETERS = """
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
"""

_PARAMETERS_2 = """
      bound = Constant <value_float: float = @bboxXformClip> ()
      is_bounded = Greater (bound, zero_f)
      clip_before_int = Constant <value_int: int = @clipBeforeNms> ()
      clip_before = Cast <to = 9> (clip_before_int)
"""

_JOIN = """
      # Levels joined: deltas [N, 4, P], and logits [N, C, P] where no level has a cut of its own.
      zero = Constant <value_ints = [0]> ()
      loc_shape = Constant <value_ints = [0, 4, -1]> ()
      conf_shape = Concat <axis = 0> (zero, num_classes, minus_one)
      {flatten}
      loc_joined = Concat <axis = 2> ({loc_rows})
      {join_conf}
      deltas = Cast <to = 1> (loc_joined)
      {cast_conf}
"""

_DECODE = """
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
      move, {log_stretch} = Split <axis = 1, num_outputs = 2> (scaled)
      {bound}
      shift = Mul (move, prior_size)
      centre = Add (shift, prior_centre)
      stretch = Exp (log_stretch)
      size = Mul (stretch, prior_size)
      half_size = Mul (size, half_f)
      lt = Sub (centre, half_size)
      rb = Add (centre, half_size)
      ltrb = Concat <axis = 1> (lt, rb)
"""

_BOUND = """
      least = Min (unbounded, bound)
      log_stretch = Where (is_bounded, least, unbounded)
"""

_CLIP = """
      # What suppression sees.
      ltrb_clipped = Clip (ltrb, zero_f, one_f)
      ltrb_seen = Where (clip_before, ltrb_clipped, ltrb)
"""

_CLASSES = """
      zero_scalar = Constant <value_int = 0> ()
      one_scalar = Constant <value_int = 1> ()
      classes = Range (zero_scalar, num_classes_scalar, one_scalar)
      class_shape = Constant <value_ints = [1, -1, 1]> ()
      class_column = Reshape (classes, class_shape)
      is_background = Equal (class_column, background)
      is_foreground = Not (is_background)
"""

_BY_CLASS = """
      # Scores [N, C, P], void where they cannot count. x * 0 is 0 for finite x alone, else NaN.
      probability = {activation} (logits)
      logits_0 = Mul (logits, zero_f)
      ltrb_0 = Mul (ltrb, zero_f)
      logits_check = ReduceSum <keepdims = 1> (logits_0, one)
      ltrb_check = ReduceSum <keepdims = 1> (ltrb_0, one)
      check = Add (logits_check, ltrb_check)
      finite = Equal (check, zero_f)
      {classes}
      counts = And (finite, is_foreground)
      scores = Where (counts, probability, void_f)

      # The K = min(topK, P) best of each class; of equal scores the lower prior.
      num_priors = Shape <start = 2> (scores)
      k = Min (top_k, num_priors)
      class_scores, class_priors = TopK <axis = 2> (scores, k)
      candidate_shape = Constant <value_ints = [0, -1, 1]> ()
      candidate_priors = Reshape (class_priors, candidate_shape)
      ltrb_rows = Transpose <perm = [0, 2, 1]> ({ltrb})
      candidates = GatherND <batch_dims = 1> (ltrb_rows, candidate_priors)
"""

_BY_LEVEL = """
      # Where a prior's box is finite, and where the priors of each level lie.
      ltrb_0 = Mul (ltrb, zero_f)
      ltrb_check = ReduceSum <keepdims = 1> (ltrb_0, one)
      {classes}
      level_top_k_scalar = Constant <value_int: int = @levelTopK> ()
      level_top_k = Reshape (level_top_k_scalar, one)
      {priors_of_levels}
      level_sizes = Concat <axis = 0> ({priors_names})
      {check_names} = Split <axis = 2> (ltrb_check, level_sizes)
      {levels}

      # K candidates, level by level: scores, classes and priors [N, K], boxes [N, K, 4].
      candidate_scores = Concat <axis = 1> ({scores_names})
      candidate_labels = Concat <axis = 1> ({labels_names})
      candidate_priors = Concat <axis = 1> ({places_names})
      k = Shape <start = 1> (candidate_scores)
      prior_column = Unsqueeze (candidate_priors, minus_one)
      ltrb_rows = Transpose <perm = [0, 2, 1]> (ltrb_seen)
      candidates = GatherND <batch_dims = 1> (ltrb_rows, prior_column)
"""

_LEVEL = """
      # Level {i}: its min(levelTopK, C * P) best of scores [N, C * P], void where they cannot
      # count; of equal scores the lower class, then prior.
      logits_{i} = Cast <to = 1> (conf_{i}_rows)
      probability_{i} = {activation} (logits_{i})
      logits_0_{i} = Mul (logits_{i}, zero_f)
      logits_check_{i} = ReduceSum <keepdims = 1> (logits_0_{i}, one)
      check_{i} = Add (logits_check_{i}, ltrb_check_{i})
      finite_{i} = Equal (check_{i}, zero_f)
      counts_{i} = And (finite_{i}, is_foreground)
      scores_{i} = Where (counts_{i}, probability_{i}, void_f)
      flat_{i} = Flatten <axis = 1> (scores_{i})
      there_{i} = Shape <start = 1> (flat_{i})
      k_{i} = Min (level_top_k, there_{i})
      best_scores_{i}, best_{i} = TopK <axis = 1> (flat_{i}, k_{i})
      labels_{i} = Div (best_{i}, priors_{i})
      own_place_{i} = Mod (best_{i}, priors_{i})
      places_{i} = Add (own_place_{i}, start_{i})
      start_{next} = Add (start_{i}, priors_{i})
"""

_BOXES = """
      # Raising the far corner to the near one makes an inverted box empty; the operator would flip
      # it.
      near, far = Split <axis = 2, num_outputs = 2> (candidates)
      far_or_near = Max (near, far)
      boxes = Concat <axis = 2> (near, far_or_near)
"""

_SUPPRESS_BY_CLASS = """
      # Suppression, each class of each image a batch of its own: boxes [N * C, K, 4].
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
      nothing = ConstantOfShape <value = float[1] {-1.0}> (flat_shape)
      survivors = ScatterND (nothing, kept, kept_scores)
      class_scores_shape = Shape (class_scores)
      survivors_by_class = Reshape (survivors, class_scores_shape)
      survivors_of_image = Flatten <axis = 1> (survivors_by_class)
"""

_SUPPRESS_TOGETHER = """
      # Suppression, the candidates of an image over C rows of scores [N, C, K], void where a
      # candidate is of another class.
      label_row = Unsqueeze (candidate_labels, one)
      score_row = Unsqueeze (candidate_scores, one)
      is_of_class = Equal (label_row, class_column)
      class_scores = Where (is_of_class, score_row, void_f)
      kept = NonMaxSuppression (boxes, class_scores, k, iou_threshold, score_threshold)

      # Scores of the kept, void elsewhere, [N, C * K] in the order class, place among candidates.
      kept_scores = GatherND (class_scores, kept)
      class_scores_shape = Shape (class_scores)
      nothing = ConstantOfShape <value = float[1] {-1.0}> (class_scores_shape)
      survivors_by_class = ScatterND (nothing, kept, kept_scores)
      survivors_of_image = Flatten <axis = 1> (survivors_by_class)
"""

_BEST = """
      # The keepTopK best of the image; padding makes sure that there are as many to choose from.
      no_pad = Constant <value_ints = [0, 0, 0]> ()
      pads = Concat <axis = 0> (no_pad, keep_top_k)
      padded = Pad (survivors_of_image, pads, void_f)
      best_scores, best = TopK <axis = 1> (padded, keep_top_k)
      used = Greater (best_scores, score_threshold)
      num_used = Cast <to = 6> (used)
      num_detections = ReduceSum <keepdims = 0> (num_used, one)
"""

_SLOT = """
      # Rows.
      slot = Where (used, best, zero_scalar)
"""

_SLOT_BY_CLASS = """
      slot_column = Unsqueeze (slot, minus_one)
"""

_SLOT_TOGETHER = """
      place = Mod (slot, k)
      slot_column = Unsqueeze (place, minus_one)
"""

_ROWS = """
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
"""


def body(inputs: Sequence[str], *, sigmoid: bool, version: int, by_level: bool) -> str:
    """Write the nodes of a body.

    Parameters
    ----------
    inputs
        Loc of every level, conf of every level, priors.
    sigmoid
        Scores are the sigmoid of each logit; else the softmax over the classes.
    version
        1, or 2 for the attributes of ours.
    by_level
        With the cut of levelTopK; of version 2 alone.
    """
    count = len(inputs) // 2
    activation = "Sigmoid" if sigmoid else "Softmax <axis = 1>"
    rows = [f"{name}_rows" for name in inputs[:-1]]
    shapes = [f"{name[:4].rstrip('_')}_shape" for name in inputs[:-1]]
    flatten = "\n".join(
        f"{row} = Reshape ({name}, {shape})"
        for name, row, shape in zip(inputs, rows, shapes, strict=False)
    )
    joined = f"conf_joined = Concat <axis = 2> ({', '.join(rows[count:])})"
    pieces = [
        _PARAMETERS,
        _PARAMETERS_2 if version == 2 else "",
        _JOIN.format(
            flatten=flatten,
            loc_rows=", ".join(rows[:count]),
            join_conf="" if by_level else joined,
            cast_conf="" if by_level else "logits = Cast <to = 1> (conf_joined)",
        ),
        _DECODE.format(
            log_stretch="unbounded" if version == 2 else "log_stretch",
            bound=_BOUND if version == 2 else "",
        ),
        _CLIP if version == 2 else "",
    ]
    if by_level:
        pieces += [_by_level(count, activation), _BOXES, _SUPPRESS_TOGETHER, _BEST]
        pieces += [_SLOT, _SLOT_TOGETHER]
    else:
        ltrb = "ltrb_seen" if version == 2 else "ltrb"
        pieces.append(_BY_CLASS.format(activation=activation, classes=_CLASSES, ltrb=ltrb))
        pieces += [_BOXES, _SUPPRESS_BY_CLASS, _BEST, _SLOT, _SLOT_BY_CLASS]
    return "".join([*pieces, _ROWS])


def _by_level(count: int, activation: str) -> str:
    def names(pattern: str) -> str:
        return ", ".join(pattern.format(i) for i in range(count))

    sizes = [f"priors_{i} = Shape <start = 2> (conf_{i}_rows)" for i in range(count)]
    levels = [_LEVEL.format(i=i, next=i + 1, activation=activation) for i in range(count)]
    return _BY_LEVEL.format(
        classes=_CLASSES,
        priors_of_levels="\n".join([*sizes, "start_0 = Constant <value_ints = [0]> ()"]),
        priors_names=names("priors_{}"),
        check_names=names("ltrb_check_{}"),
        levels="".join(levels),
        scores_names=names("best_scores_{}"),
        labels_names=names("labels_{}"),
        places_names=names("places_{}"),
    )

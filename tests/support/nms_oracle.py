"""NMS_OPT_TRT by brute force: the rules of the operator, one loop each, float32."""

import numpy as np


def decode(loc: np.ndarray, priors: np.ndarray, bound: float = 0.0) -> np.ndarray:
    """Deltas [N, 4, P] and priors [2, P * 4, 1] to boxes [N, P, 4], ltrb, not clipped.

    `bound`: of dw and dh times their variance; 0: none.
    """
    corners, variances = np.float32(priors).reshape(2, -1, 4)
    boxes = np.empty((len(loc), len(corners), 4), np.float32)
    half = np.float32(0.5)
    with np.errstate(all="ignore"):
        for n, image in enumerate(np.float32(loc)):
            for p, (x0, y0, x1, y1) in enumerate(corners):
                dx, dy, dw, dh = image[:, p] * variances[p]
                if bound:
                    dw, dh = np.minimum([dw, dh], np.float32(bound))  # NaN stays
                w, h = np.exp(dw) * (x1 - x0), np.exp(dh) * (y1 - y0)
                x, y = dx * (x1 - x0) + (x0 + x1) * half, dy * (y1 - y0) + (y0 + y1) * half
                boxes[n, p] = x - w * half, y - h * half, x + w * half, y + h * half
    return boxes


def decode_all(loc: np.ndarray, priors: np.ndarray, bound: float = 0.0) -> np.ndarray:
    """`decode` in arrays, for many priors."""
    corners, variances = np.float32(priors).reshape(2, -1, 4)
    half = np.float32(0.5)
    size = corners[:, 2:] - corners[:, :2]
    with np.errstate(all="ignore"):
        scaled = np.float32(loc).transpose(0, 2, 1) * variances
        centre = scaled[..., :2] * size + (corners[:, :2] + corners[:, 2:]) * half
        stretch = np.minimum(scaled[..., 2:], np.float32(bound or np.inf))  # NaN stays
        reach = np.exp(stretch) * size * half
        return np.concatenate([centre - reach, centre + reach], axis=-1)


def softmax(conf: np.ndarray) -> np.ndarray:
    """Logits [N, C, P], float32 or float64, to probabilities over C."""
    logits = conf if conf.dtype == np.float64 else np.float32(conf)
    with np.errstate(all="ignore"):
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)


def sigmoid(conf: np.ndarray) -> np.ndarray:
    """Logits [N, C, P] to the logistic function of each."""
    with np.errstate(all="ignore"):
        return 1 / (1 + np.exp(-(conf if conf.dtype == np.float64 else np.float32(conf))))


def iou(a: np.ndarray, b: np.ndarray) -> np.float32:
    """IoU of two boxes [4], ltrb; a box without positive width and height overlaps nothing."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.float32(0)
    area_a, area_b = (
        (box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0
        for box in (a, b)
    )
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if not (area_a > 0 and area_b > 0 and w > 0 and h > 0):
        return np.float32(0)
    with np.errstate(all="ignore"):
        return w * h / (area_a + area_b - w * h)


def nms_opt(attributes, priors, loc, conf, levels=()) -> tuple[np.ndarray, np.ndarray]:
    """Joined head tensors [N, 4, P] and [N, C, P] to detections and num_detections [N].

    `levels`: (anchors, height, width) of each, for levelTopK.
    """
    activation = sigmoid if attributes.confSigmoid else softmax
    loc, conf = np.float32(loc), np.float32(conf)
    batch, classes, count = conf.shape
    boxes, scores = decode(loc, priors, attributes.bboxXformClip), activation(conf)
    detections = np.zeros((batch, attributes.keepTopK, 7), np.float32)
    detections[..., 6] = -1
    numbers = np.zeros(batch, np.int32)
    score_threshold = np.float32(attributes.confidenceThreshold)
    iou_threshold = np.float32(attributes.nmsThreshold)
    for n in range(batch):
        detections[n, :, 0] = n
        candidates = [
            (-scores[n, c, p], c, p)
            for c in range(classes)
            for p in range(count)
            if c != attributes.backgroundLabelId
            and np.isfinite(conf[n, :, p]).all()
            and np.isfinite(boxes[n, p]).all()
            and scores[n, c, p] > score_threshold
        ]
        if attributes.levelTopK:
            candidates = best_of_levels(candidates, levels, attributes.levelTopK)
        seen = boxes[n].clip(0, 1) if attributes.clipBeforeNms else boxes[n]
        survivors = []
        for c in range(classes):
            kept = []
            for score, _, p in sorted(one for one in candidates if one[1] == c)[: attributes.topK]:
                if not any(iou(seen[p], seen[q]) > iou_threshold for _, _, q in kept):
                    kept.append((score, c, p))
            survivors += kept
        for row, (score, c, p) in enumerate(sorted(survivors)[: attributes.keepTopK]):
            x0, y0, x1, y1 = boxes[n, p].clip(0, 1)
            detections[n, row] = n, y0, x0, y1, x1, -score, c
            numbers[n] += 1
    return detections, numbers


def best_of_levels(candidates, levels, most) -> list:
    """The first candidates (-score, class, prior) of each level."""
    ends = np.cumsum([a * h * w for a, h, w in levels])
    kept = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        kept += sorted(one for one in candidates if start <= one[2] < end)[:most]
    return kept

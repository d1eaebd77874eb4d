"""A comparison of detections that forgives what hangs on rounding, and nothing else."""

from collections.abc import Callable

import numpy as np

from graph_surgery import rounding
from tests.support.nms_oracle import decode_all, sigmoid, softmax


def undecided(loc, conf, priors, attributes, levels=()) -> rounding.Undecided:
    """What hangs on rounding, from the deltas [4, P] and logits [C, P] of one image.

    `levels`: (anchors, height, width) of each, for levelTopK.
    """
    boxes = decode_all(loc[None], priors, attributes.bboxXformClip)[0]
    scores = (sigmoid if attributes.confSigmoid else softmax)(np.float64(conf[None]))[0]
    scores[:, ~(np.isfinite(conf).all(axis=0) & np.isfinite(boxes).all(axis=1))] = -1
    if attributes.backgroundLabelId >= 0:
        scores[attributes.backgroundLabelId] = -1
    # a number for every column of logits (softmax); with the logit it determines a score
    column = 0
    if not attributes.confSigmoid:
        column = np.unique(np.float32(conf).T, axis=0, return_inverse=True)[1].reshape(-1)
    logit = np.unique(np.float32(conf), return_inverse=True)[1].reshape(conf.shape)
    a = attributes
    rules = rounding.Rules(
        a.confidenceThreshold,
        a.nmsThreshold,
        a.topK,
        a.keepTopK,
        a.levelTopK,
        clip=a.clipBeforeNms == 1,
    )
    sizes = [anchors * height * width for anchors, height, width in levels]
    return rounding.undecided(boxes, scores, column * (logit.max() + 1) + logit, rules, sizes)


def check_same(actual, expected, doubtful: Callable[[int], rounding.Undecided]) -> None:
    """Compare (detections, num_detections); `doubtful` gives what is `undecided` of an image."""
    detections, count = actual
    expected_detections, expected_count = expected
    assert detections.dtype == np.float32
    assert count.dtype == np.int32
    assert detections.shape == expected_detections.shape
    assert count.shape == expected_count.shape
    assert ((count >= 0) & (count <= detections.shape[1])).all()
    for n, (rows, other) in enumerate(zip(detections, expected_detections, strict=True)):
        assert (rows[:, 0] == n).all()
        assert (rows[count[n] :, 1:] == [0, 0, 0, 0, 0, -1]).all()
        found, wanted = rows[: count[n], 1:], other[: expected_count[n], 1:]
        outcome = rounding.compare(found, wanted, lambda n=n: doubtful(n))
        assert not outcome.faults, outcome

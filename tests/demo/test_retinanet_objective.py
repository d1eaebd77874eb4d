"""RetinaNet's training objective against a computation by hand, anchor by anchor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.objective import IGNORED, Targets, encode
from demo.retinanet_objective import focal_loss, match
from export.retinanet.postprocess import RetinaNetPostProcess
from tests.support.retinanet import SMALL


def overlap(a, b):
    w, h = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return max(w, 0) * max(h, 0)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a, b):
    return overlap(a, b) / (area(a) + area(b) - overlap(a, b))


def by_hand(boxes, classes, corners):
    """Class and owner of every anchor."""
    objects = [m for m, kind in enumerate(classes) if kind > 0]
    found = []
    for corner in corners:
        table = {m: iou(boxes[m], corner) for m in objects}
        owner = max(objects, key=lambda m: (table[m], -m)) if objects else None
        nearest = any(
            table[m] == max(iou(boxes[m], other) for other in corners) > 0 for m in objects
        )
        crowd = any(
            kind == IGNORED and overlap(boxes[m], corner) > 0.5 * area(corner)
            for m, kind in enumerate(classes)
        )
        if owner is not None and (table[owner] >= 0.5 or nearest):
            found.append((classes[owner], owner))
        elif crowd or (owner is not None and table[owner] >= 0.4):
            found.append((IGNORED, None))
        else:
            found.append((0, None))
    return found


def run_match(boxes, classes, corners):
    lt, rb = np.split(corners, 2, axis=1)
    centred = np.concatenate([(lt + rb) / 2, rb - lt], axis=1)
    return match(
        torch.tensor(boxes[None], dtype=torch.float32),
        torch.tensor(classes[None]),
        torch.tensor(centred, dtype=torch.float32),
    )


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_matching_against_brute_force(seed, count):
    """On a grid of 1/16, where float32 is exact: overlaps tie, and lie on the thresholds."""
    rng = np.random.default_rng(seed)

    def draw(number):
        start = rng.integers(0, 12, (number, 2))
        return np.concatenate([start, start + rng.integers(2, 6, (number, 2))], 1) / 16

    corners, boxes = draw(40), draw(5)
    classes = np.zeros(5, np.int64)
    classes[:count] = rng.integers(1, 81, count)
    classes[4] = IGNORED
    targets = run_match(boxes, classes, corners)
    for p, (kind, owner) in enumerate(by_hand(boxes, classes, corners)):
        assert targets.classes[0, p] == kind
        if owner is not None:
            (left, top, right, bottom), (x0, y0, x1, y1) = boxes[owner], corners[p]
            w, h = x1 - x0, y1 - y0
            deltas = [
                (left + right - x0 - x1) / 2 / w,
                (top + bottom - y0 - y1) / 2 / h,
                math.log((right - left) / w),
                math.log((bottom - top) / h),
            ]
            assert targets.deltas[0, :, p].numpy() == pytest.approx(deltas, abs=1e-5)


def test_matching_on_the_thresholds():
    corners = np.array([
        [0.0, 0.0, 0.5, 0.25],  # IoU exactly 0.5 with the first
        [0.0, 0.0, 0.5, 0.5],  # the first itself
        [0.0, 0.0, 0.5, 0.21],  # 0.42: neither
        [0.0, 0.0, 0.5, 0.19],  # 0.38: background
        [0.5, 0.5, 1.0, 0.625],  # 0.25 with the second, which has no nearer one
        [0.5, 0.75, 1.0, 0.875],  # as near
    ])  # fmt: skip
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    targets = run_match(boxes, np.array([7, 9]), corners)
    assert targets.classes.tolist() == [[7, 7, IGNORED, 0, 9, 9]]


def test_an_anchor_nearest_to_one_object_takes_the_one_it_overlaps_more():
    """As torchvision: the second object's best anchor is the first object's all the same."""
    corners = np.array([[0.0, 0.0, 0.5, 0.5], [0.75, 0.75, 1.0, 1.0]])
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.25, 0.25]])
    targets = run_match(boxes, np.array([3, 4]), corners)
    assert targets.classes.tolist() == [[3, 0]]


def test_encoding_is_the_inverse_of_the_network_s_decoding():
    postprocess = RetinaNetPostProcess(SMALL)
    priors = torch.cat([postprocess.centre, postprocess.size]).T
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(2, len(priors), 2, generator=generator) * 0.7
    boxes = torch.cat([start, start + torch.rand(start.shape, generator=generator) * 0.2 + 0.1], 2)
    decoded = postprocess.decode(encode(boxes, priors).transpose(1, 2))
    assert torch.allclose(decoded, boxes, atol=1e-5)


def random_case(seed, dtype=torch.float64):
    """Three classes, two images of seven anchors, of every kind."""
    generator = torch.Generator().manual_seed(seed)
    loc, deltas = torch.randn(2, 2, 4, 7, generator=generator, dtype=dtype)
    conf = 3 * torch.randn(2, 3, 7, generator=generator, dtype=dtype)
    classes = torch.tensor([[1, 0, IGNORED, 3, 2, 0, 0], [0, 0, IGNORED, 0, 0, 1, 0]])
    return loc, conf, Targets(classes, deltas)


@pytest.mark.parametrize("seed", range(5))
def test_losses_against_the_paper_s_formulas(seed):
    loc, conf, targets = random_case(seed)
    box = focal = 0.0
    for n in range(2):
        for p in range(7):
            kind = int(targets.classes[n, p])
            if kind == IGNORED:
                continue
            if kind > 0:
                box += sum(abs(float(loc[n, i, p] - targets.deltas[n, i, p])) for i in range(4))
            for c in range(3):
                score = 1 / (1 + math.exp(-float(conf[n, c, p])))
                there = kind == c + 1
                p_t, alpha_t = (score, 0.25) if there else (1 - score, 0.75)
                focal -= alpha_t * (1 - p_t) ** 2 * math.log(p_t)
    found = focal_loss(loc, conf, targets)
    assert [float(v) for v in found] == pytest.approx([box / 4, focal / 4])


def test_gradients_against_finite_differences():
    loc, conf, targets = random_case(9)
    loc.requires_grad_()
    conf.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: focal_loss(a, b, targets), (loc, conf))


def test_what_is_ignored_has_no_gradient():
    loc, conf, targets = random_case(2)
    loc.requires_grad_()
    conf.requires_grad_()
    torch.autograd.backward(focal_loss(loc, conf, targets))
    ignored = targets.classes == IGNORED
    assert not conf.grad.transpose(1, 2)[ignored].any()
    assert conf.grad.transpose(1, 2)[~ignored].all()
    assert not loc.grad.transpose(1, 2)[targets.classes <= 0].any()


def test_sure_and_wrong_logits_stay_finite():
    _, conf, targets = random_case(4, torch.float32)
    for sign in (-1, 1):
        wide = (sign * 200 * conf.sign()).requires_grad_()
        loss = focal_loss(torch.zeros(2, 4, 7), wide, targets)[1]
        torch.autograd.backward(loss)
        assert loss.isfinite()
        assert wide.grad.isfinite().all()


def test_pictures_without_objects():
    loc, conf, targets = random_case(3)
    nothing = Targets(torch.zeros_like(targets.classes), targets.deltas)
    box, focal = focal_loss(loc, conf, nothing)
    assert box == 0
    score = conf.sigmoid()
    assert focal == pytest.approx(float((0.75 * score**2 * -(1 - score).log()).sum()))

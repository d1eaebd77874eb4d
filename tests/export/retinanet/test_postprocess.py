"""RetinaNet's postprocess against torchvision's detections and a brute-force oracle."""

import math

import numpy as np
import pytest
import torch

from export.retinanet.config import RetinaNetConfig
from export.retinanet.postprocess import RetinaNetPostProcess
from tests.support.retinanet import SMALL, detect
from tests.support.retinanet_golden import reference

LEVELS = ("p3", "p4", "p5", "p6", "p7")


def heads(data, kind: str) -> list[torch.Tensor]:
    """Raw outputs of the head convolutions; the large case has them sparse."""
    levels = []
    for level in LEVELS:
        if f"{kind}_{level}" in data:
            array = data[f"{kind}_{level}"]
        else:
            shape = data[f"{kind}_{level}_shape"]
            array = np.full(np.prod(shape), data[f"{kind}_fill"], np.float32)
            array[data[f"{kind}_{level}_idx"]] = data[f"{kind}_{level}_val"]
            array = array.reshape(shape)
        levels.append(torch.from_numpy(array))
    return levels


def golden_config(data) -> RetinaNetConfig:
    height, width = data["image_size"].tolist()
    return RetinaNetConfig(height, width, int(data["num_classes"]))


@pytest.mark.parametrize("case", [1, 2, 3, 4, pytest.param(800, marks=pytest.mark.slow)])
def test_golden_detections(golden, case):
    data = np.load(reference(golden, f"tail_{case}.npz"))
    config = golden_config(data)
    with torch.inference_mode():
        found = RetinaNetPostProcess(config)(heads(data, "reg"), heads(data, "cls"))
    size = np.array([config.image_height, config.image_width] * 2)
    for image, (detections, count) in enumerate(zip(*(t.numpy() for t in found), strict=True)):
        boxes, scores, labels = (data[f"{k}_{image}"] for k in ("boxes", "scores", "labels"))
        assert count == len(scores)
        rows = detections[:count]
        assert (rows[:, 0] == image).all()
        assert (detections[count:, 1:] == [0, 0, 0, 0, 0, -1]).all()
        np.testing.assert_allclose(rows[:, 5], scores, atol=1e-6)
        # rows of equal score have no order in the golden data
        wanted = np.column_stack([boxes[:, [1, 0, 3, 2]], labels])
        actual = np.column_stack([rows[:, 1:5] * size, rows[:, 6]])
        for score in np.unique(scores):
            tied = scores == score
            distance = np.abs(actual[tied, None] - wanted[tied]).max(axis=2)
            assert sorted(distance.argmin(axis=1)) == list(range(tied.sum()))
            assert distance.min(axis=1).max() < 2e-3


@pytest.fixture
def crowded():
    """Heads of two images on which every rule decides: cuts, ties, clips, bounds, empty boxes.

    Of the first level 990 scores of one class lie on one box, so that its cut leaves few others.
    """
    rng = np.random.default_rng(5)
    loc = rng.normal(0, 0.4, (2, 4, SMALL.num_priors))
    loc[:, 2:][rng.random((2, 2, SMALL.num_priors)) < 0.05] = 5  # beyond the bound
    loc[:, :2][rng.random((2, 2, SMALL.num_priors)) < 0.01] = 40  # off the image: no area
    conf = rng.choice(
        [-9.0, -2.0, -1.0, 0.5, 1.0], (2, 12, SMALL.num_priors), p=[0.9, 0.04, 0.03, 0.02, 0.01]
    )
    postprocess = RetinaNetPostProcess(SMALL)
    many = rng.choice(math.prod(SMALL.levels[0]), 990, replace=False)
    centre, size = (part.numpy()[:, many] for part in (postprocess.centre, postprocess.size))
    loc[:, :2, many] = (0.5 - centre) / size
    loc[:, 2:, many] = np.log(0.25 / size)
    conf[:, 3, many] = rng.uniform(2, 4, (2, 990))
    return loc.astype(np.float32), conf.astype(np.float32)


def test_equals_brute_force(crowded):
    loc, conf = crowded
    postprocess = RetinaNetPostProcess(SMALL)
    for broken, value in ((7, np.nan), (70, np.inf), (700, -np.inf)):
        loc[0, broken % 4, broken], conf[1, broken % 12, broken] = value, value
    levels = [[torch.from_numpy(t) for t in postprocess.split(part)] for part in (loc, conf)]
    detections, count = (t.numpy() for t in postprocess(*levels))
    boxes = postprocess.decode(torch.from_numpy(loc)).numpy()
    scores = torch.from_numpy(conf).sigmoid().numpy()
    void = ~np.isfinite(conf).all(axis=1) | ~np.isfinite(boxes).all(axis=2)
    scores[void[:, None].repeat(12, axis=1)] = np.nan
    sizes = [a * h * w for a, h, w in SMALL.levels]
    for image in range(2):
        wanted = detect(boxes[image], scores[image], sizes)
        assert count[image] == len(wanted) == 300
        rows = [(r[5], r[6], *r[[2, 1, 4, 3]]) for r in detections[image]]
        assert rows == [(np.float32(s), label, *box) for s, label, _, box in wanted]


@pytest.mark.parametrize("cut", [995, 1005])
def test_another_cut_gives_other_rows(crowded, cut, monkeypatch):
    """On these heads, so that the oracle above, which cuts to 1000, tells a wrong cut."""
    postprocess = RetinaNetPostProcess(SMALL)
    levels = [[torch.from_numpy(t) for t in postprocess.split(part)] for part in crowded]
    rows, _ = postprocess(*levels)
    monkeypatch.setattr("export.retinanet.postprocess.LEVEL_TOP_K", cut)
    others, _ = postprocess(*levels)
    assert all((one != other).any() for one, other in zip(rows, others, strict=True))


def test_join_and_split(crowded):
    postprocess = RetinaNetPostProcess(SMALL)
    for joined in crowded:
        rows = joined.shape[1]
        levels = [torch.from_numpy(level) for level in postprocess.split(joined)]
        np.testing.assert_array_equal(postprocess.join(levels, rows).numpy(), joined)
    # channel a * K + class of a cell is anchor a
    level = torch.zeros(1, 9 * 12, 16, 20)
    level[0, 5 * 12 + 7, 3, 4] = 1
    flat = postprocess.flat(level, 12)
    assert flat.nonzero().tolist() == [[0, 7, (5 * 16 + 3) * 20 + 4]]

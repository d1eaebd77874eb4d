"""What the training objectives of the detectors share: targets, overlaps, box encoding."""

import dataclasses

import torch
from torch import Tensor

IGNORED = -1
"""Class of a box whose inside is neither object nor background (a crowd)."""
CROWD_COVER = 0.5
"""A prior is left out when more of it than this lies in an ignored box, unless it is matched."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the network should say, per image and prior (default box, anchor).

    Attributes
    ----------
    classes
        int64 [N, P], 1.. object, 0 background, IGNORED.
    deltas
        float32 [N, 4, P], encoded box; meaningful where an object is matched.
    """

    classes: Tensor
    deltas: Tensor


def encode(boxes: Tensor, priors: Tensor, variances: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Express boxes relative to priors, the inverse of the network's decoding.

    Parameters
    ----------
    boxes
        float32 [..., P, 4], ltrb, normalised.
    priors
        float32 [P, 4], cx, cy, w, h, normalised.
    variances
        Factors of the decoding on the deltas of centre and size.

    Returns
    -------
    float32 [..., P, 4].
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    xy = (centre - priors[:, :2]) / (variances[0] * priors[:, 2:])
    wh = torch.log(size / priors[:, 2:]) / variances[1]
    return torch.cat([xy, wh], dim=-1)


def overlaps(boxes: Tensor, classes: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """Compare every object with every prior.

    Parameters
    ----------
    boxes
        float32 [N, M, 4], ltrb, normalised.
    classes
        int64 [N, M], 1.. object, 0 empty row, IGNORED.
    priors
        float32 [P, 4], cx, cy, w, h, normalised.

    Returns
    -------
    iou
        float32 [N, M, P]; -1 in the rows that are no objects.
    crowded
        bool [N, P], whether more than CROWD_COVER of the prior lies in an ignored box.
    """
    corners = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
    lt = torch.maximum(boxes[:, :, None, :2], corners[:, :2])
    rb = torch.minimum(boxes[:, :, None, 2:], corners[:, 2:])
    overlap = (rb - lt).clamp(min=0).prod(-1)  # [N, M, P]
    prior_area = priors[:, 2:].prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    iou = overlap / (area[..., None] + prior_area - overlap).clamp(min=1e-9)
    crowd = (classes == IGNORED)[..., None]
    crowded = ((overlap / prior_area > CROWD_COVER) & crowd).any(dim=1)
    return iou.masked_fill((classes <= 0)[..., None], -1.0), crowded


def to_targets(
    boxes: Tensor,
    classes: Tensor,
    priors: Tensor,
    *,
    owner: Tensor,
    matched: Tensor,
    ignored: Tensor,
    variances: tuple[float, float] = (1.0, 1.0),
) -> Targets:
    """Give priors their objects.

    Parameters
    ----------
    boxes, classes, priors
        See `overlaps`.
    owner
        int64 [N, P], row of the object that a prior would take.
    matched
        bool [N, P], whether it takes that.
    ignored
        bool [N, P], whether it is left out otherwise.
    variances
        See `encode`.
    """
    target = classes.gather(1, owner).where(matched, 0).masked_fill(ignored & ~matched, IGNORED)
    own = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    return Targets(target, encode(own, priors, variances).transpose(1, 2))

"""SSD's training objective: matching of default boxes, box encoding, MultiBox loss.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector", sections 2.2 and the reference's variances.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, smooth_l1_loss

from export.ssd_resnet34.default_boxes import VARIANCES

IGNORED = -1
"""Class of a box whose inside is neither object nor background (a crowd)."""
MATCH_IOU = 0.5
CROWD_COVER = 0.5  # a default box is left out when more of it than this lies in an ignored box
NEGATIVES = 3  # background boxes that count, per matched one
LOC_BETA = 1 / 9  # where smooth L1 turns linear, in encoded units


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the network should say, per image and default box.

    Attributes
    ----------
    classes
        int64 [N, P], 1.. object, 0 background, IGNORED.
    deltas
        float32 [N, 4, P], encoded box; meaningful where an object is matched.
    """

    classes: Tensor
    deltas: Tensor


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """Express boxes relative to default boxes, the inverse of the network's decoding.

    Parameters
    ----------
    boxes
        float32 [..., P, 4], ltrb, normalised.
    priors
        float32 [P, 4], cx, cy, w, h, normalised.

    Returns
    -------
    float32 [..., P, 4].
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    xy = (centre - priors[:, :2]) / (VARIANCES[0] * priors[:, 2:])
    wh = torch.log(size / priors[:, 2:]) / VARIANCES[2]
    return torch.cat([xy, wh], dim=-1)


def match(boxes: Tensor, classes: Tensor, priors: Tensor) -> Targets:
    """Assign an object, background or nothing to every default box.

    A default box takes the object it overlaps most, from IoU MATCH_IOU; every object also gets
    the default box that overlaps it most.

    Parameters
    ----------
    boxes
        float32 [N, M, 4], ltrb, normalised.
    classes
        int64 [N, M], 1.. object, 0 empty row, IGNORED.
    priors
        float32 [P, 4], cx, cy, w, h, normalised.
    """
    corners = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
    lt = torch.maximum(boxes[:, :, None, :2], corners[:, :2])
    rb = torch.minimum(boxes[:, :, None, 2:], corners[:, 2:])
    overlap = (rb - lt).clamp(min=0).prod(-1)  # [N, M, P]
    prior_area = priors[:, 2:].prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    iou = overlap / (area[..., None] + prior_area - overlap).clamp(min=1e-9)
    iou = iou.masked_fill((classes <= 0)[..., None], -1.0)

    # Two added to an object's best default box wins against every plain IoU.
    forced = torch.zeros_like(iou).scatter_(2, iou.argmax(2, keepdim=True), 2.0)
    iou = iou + forced * (classes > 0)[..., None]
    best, owner = iou.max(dim=1)  # [N, P]
    target = classes.gather(1, owner).where(best >= MATCH_IOU, 0)

    crowd = (classes == IGNORED)[..., None]
    covered = ((overlap / prior_area > CROWD_COVER) & crowd).any(dim=1)
    target = target.masked_fill(covered & (target == 0), IGNORED)
    own = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    return Targets(target, encode(own, priors).transpose(1, 2))


def multibox_loss(loc: Tensor, conf: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Box and class loss, each summed over the batch and divided by the matched boxes.

    Background is mined over the whole batch: NEGATIVES times as many default boxes as are matched,
    those with the highest loss, so that pictures without objects count too.

    Parameters
    ----------
    loc
        float32 [N, 4, P].
    conf
        float32 [N, C, P], logits.
    targets
        From `match`.

    Returns
    -------
    loc_loss, conf_loss
        Scalars.
    """
    positive = targets.classes > 0
    count = positive.sum().clamp(min=1)
    loc_loss = smooth_l1_loss(loc, targets.deltas, reduction="none", beta=LOC_BETA).sum(1)
    loc_loss = (loc_loss * positive).sum() / count

    conf_loss = cross_entropy(conf, targets.classes, ignore_index=IGNORED, reduction="none")
    background = conf_loss.detach().where(targets.classes == 0, -1.0).flatten()
    order = background.argsort(descending=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    hard = (rank < NEGATIVES * count).view_as(positive) & (targets.classes == 0)
    return loc_loss, (conf_loss * (positive | hard)).sum() / count

"""SSD's training objective: matching of default boxes and MultiBox loss.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector", sections 2.2 and the reference's variances.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, smooth_l1_loss

from demo.objective import IGNORED, Targets, overlaps, to_targets
from export.ssd_resnet34.default_boxes import VARIANCES

ENCODING = VARIANCES[0], VARIANCES[2]
MATCH_IOU = 0.5
NEGATIVES = 3  # background boxes that count, per matched one
LOC_BETA = 1 / 9  # where smooth L1 turns linear, in encoded units


def match(boxes: Tensor, classes: Tensor, priors: Tensor) -> Targets:
    """Assign an object, background or nothing to every default box.

    A default box takes the object it overlaps most, from IoU MATCH_IOU; every object also gets
    the default box that overlaps it most. Parameters are those of `overlaps`.
    """
    iou, crowded = overlaps(boxes, classes, priors)
    # Two added to an object's best default box wins against every plain IoU.
    forced = torch.zeros_like(iou).scatter_(2, iou.argmax(2, keepdim=True), 2.0)
    iou = iou + forced * (classes > 0)[..., None]
    best, owner = iou.max(dim=1)  # [N, P]
    return to_targets(
        boxes,
        classes,
        priors,
        owner=owner,
        matched=best >= MATCH_IOU,
        ignored=crowded,
        variances=ENCODING,
    )


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

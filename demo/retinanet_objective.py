"""RetinaNet's training objective: matching of anchors, focal loss, L1 of boxes.

Lin et al. 2017, "Focal Loss for Dense Object Detection", sections 3 and 4; the details that it
leaves open are torchvision's.
"""

from torch import Tensor
from torch.nn.functional import softplus

from demo.objective import Targets, overlaps, to_targets

MATCH_IOU = 0.5
IGNORE_IOU = 0.4
"""From here to MATCH_IOU an anchor counts neither as object nor as background."""
ALPHA = 0.25
"""Weight of objects; 1 - ALPHA of background."""
GAMMA = 2
"""Power of the error by which easy anchors count less."""


def match(boxes: Tensor, classes: Tensor, priors: Tensor) -> Targets:
    """Assign an object, background or nothing to every anchor.

    An anchor takes the object it overlaps most, from IoU MATCH_IOU. The anchors that overlap an
    object most, all of them where several do as much, take theirs from any IoU; as in
    torchvision, that is the object that they overlap most themselves. Unlike there, an object
    that no anchor overlaps takes none. Parameters are those of `overlaps`.
    """
    iou, crowded = overlaps(boxes, classes, priors)
    best, owner = iou.max(dim=1)  # [N, P]
    nearest = ((iou == iou.amax(dim=2, keepdim=True)) & (iou > 0)).any(dim=1)
    matched = (best >= MATCH_IOU) | nearest
    ignored = crowded | (best >= IGNORE_IOU)
    return to_targets(boxes, classes, priors, owner=owner, matched=matched, ignored=ignored)


def focal_loss(loc: Tensor, conf: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Box and class loss, each summed over the batch and divided by the matched anchors.

    The class loss is that of one sigmoid a class, over all anchors that are not ignored; the box
    loss is L1.

    Parameters
    ----------
    loc
        float32 [N, 4, P].
    conf
        float32 [N, C, P], logits; class c of the targets is c - 1 here.
    targets
        From `match`.

    Returns
    -------
    loc_loss, conf_loss
        Scalars.
    """
    positive = targets.classes > 0
    count = positive.sum().clamp(min=1)
    loc_loss = ((loc - targets.deltas).abs().sum(1) * positive).sum() / count

    # Every class as if it were absent, which nearly all are; then the one that is there put right.
    absent = _absent(conf).sum(1) * (targets.classes >= 0)
    own = conf.gather(1, (targets.classes - 1).clamp(min=0)[:, None])[:, 0]
    # A logit of x says as much for a class as -x says against it.
    present = ALPHA * (-own).sigmoid() ** GAMMA * softplus(-own) - _absent(own)
    return loc_loss, (absent + present * positive).sum() / count


def _absent(logits: Tensor) -> Tensor:
    """Focal loss where the class is not there: softplus is -log(1 - p)."""
    return (1 - ALPHA) * logits.sigmoid() ** GAMMA * softplus(logits)

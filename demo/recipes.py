"""How each detector is trained: what differs between them, and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from demo import retinanet_objective, ssd_objective
from demo.categories import CATEGORIES
from demo.objective import Targets
from export.architecture import Architecture
from export.config import Config
from export.retinanet import RETINANET
from export.retinanet.config import RetinaNetConfig
from export.ssd_resnet34 import SSD_RESNET34
from export.ssd_resnet34.config import SSDConfig


@dataclass(frozen=True)
class Recipe:
    """Training of a detector.

    Attributes
    ----------
    architecture
        The detector.
    config
        Its configuration for the demo's categories, from side of the image and width; width 64
        is the MLPerf model's.
    match
        Targets of boxes, classes and priors; see `demo.objective.overlaps`.
    loss
        Losses of boxes and classes, of deltas float32 [N, 4, P], logits float32 [N, C, P] and
        targets.
    lr
        Peak learning rate.
    """

    architecture: Architecture
    config: Callable[[int, int], Config]
    match: Callable[[Tensor, Tensor, Tensor], Targets]
    loss: Callable[[Tensor, Tensor, Targets], tuple[Tensor, Tensor]]
    lr: float


def _ssd(image_size: int, width: int) -> SSDConfig:
    return SSDConfig(image_size, num_classes=1 + len(CATEGORIES), width=width)


def _retinanet(image_size: int, width: int) -> RetinaNetConfig:
    # The groups stay four channels wide, and become fewer.
    return RetinaNetConfig(
        image_height=image_size,
        image_width=image_size,
        num_classes=len(CATEGORIES),
        width=width,
        groups=max(width // 2, 1),
        group_width=4,
        fpn_channels=4 * width,
    )


RECIPES = {
    one.architecture.name: one
    for one in (
        Recipe(SSD_RESNET34, _ssd, ssd_objective.match, ssd_objective.multibox_loss, lr=2e-3),
        Recipe(
            RETINANET,
            _retinanet,
            retinanet_objective.match,
            retinanet_objective.focal_loss,
            lr=2e-3,
        ),
    )
}
"""By name of the detector."""

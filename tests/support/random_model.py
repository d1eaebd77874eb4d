"""SSD-ResNet34 with random weights."""

from __future__ import annotations

import torch

from export.ssd_resnet34.config import SSDConfig
from export.ssd_resnet34.model import SSDResNet34


def random_model(config: SSDConfig) -> SSDResNet34:
    """A model whose activations are sane, some of whose scores pass the threshold."""
    torch.manual_seed(1)
    model = SSDResNet34(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative average: statistics of the images below
    with torch.no_grad():
        model.train()(torch.randn(4, 3, config.image_size, config.image_size))
        for head in (*model.loc, *model.conf):
            head.weight.mul_(4)  # spread the logits
    return model.eval()

"""SSD-ResNet34, MLPerf Inference's detector up to v2.0."""

from export.architecture import Architecture
from export.ssd_resnet34.config import SSDConfig
from export.ssd_resnet34.model import SSDResNet34

SSD_RESNET34 = Architecture(
    name="ssd-resnet34",
    config_key="ssd_config",
    config=SSDConfig,
    network=SSDResNet34,
    background=True,
)

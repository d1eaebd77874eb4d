"""RetinaNet, MLPerf Inference's detector from v2.1 to v5.1."""

from export.architecture import Architecture
from export.retinanet.config import RetinaNetConfig
from export.retinanet.model import RetinaNet, own_name

RETINANET = Architecture(
    name="retinanet",
    config_key="retinanet_config",
    config=RetinaNetConfig,
    network=RetinaNet,
    background=False,
    own_name=own_name,
)

"""What makes a detector: the description that loading and export work from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from export.config import Config
from export.postprocess import PostProcess


class Network(nn.Module, ABC):
    """A detector without decoding and NMS: images to head tensors."""

    config: Config

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run backbone and heads.

        Parameters
        ----------
        images
            float32 [N, 3, H, W], RGB, normalised with ImageNet mean and deviation.

        Returns
        -------
        loc, conf
            Per level [N, A_i * 4, h_i, w_i] and logits [N, A_i * C, h_i, w_i].
        """

    @abstractmethod
    def postprocess(self) -> PostProcess:
        """What makes detections of the head tensors."""


@dataclass(frozen=True)
class Architecture:
    """A detector.

    Attributes
    ----------
    name
        As commands take it.
    config_key
        Metadata key of its configuration, in .safetensors checkpoints and in the ONNX file.
    config
        Its configuration; the default is the MLPerf model.
    network
        Its network, from such a configuration.
    background
        Whether class 0 is the background, which has no name.
    own_name
        From a name in a checkpoint to that in the network, where libraries name a tensor in
        several ways.
    """

    name: str
    config_key: str
    config: type[Config]
    network: Callable[..., Network]
    background: bool
    own_name: Callable[[str], str] = str

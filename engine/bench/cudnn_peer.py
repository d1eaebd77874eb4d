"""What the cuDNN engine is measured against: the same network in PyTorch, as users would run it.

float16, channels_last, torch.compile, cuDNN's kernels benchmarked, batch norms folded; then
torchvision's NMS image by image. The weights are those of the INT8 file, dequantised.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.cudnn.graph import Convolution, Int8Graph
from engine.backends.split import Split
from engine.errors import EngineError
from plugin_cuda.bench.loads import SSD_RESNET34, HeadSet
from plugin_cuda.bench.peers import torch_detections

_WARM_UP = 3


def peer_versions() -> dict[str, Any]:
    """Versions of what the peer is made of.

    Raises
    ------
    EngineError
        When PyTorch or torchvision is missing or has no GPU.
    """
    try:
        import torch
        import torchvision
    except ImportError as error:
        raise EngineError("--peer needs PyTorch: pip install torch torchvision") from error
    if not torch.cuda.is_available():
        raise EngineError("--peer needs a PyTorch that finds the GPU")
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


def measure_peer(
    graph: Int8Graph, parts: Split, images: NDArray[np.int8], size: int, seconds: float
) -> dict[str, float]:
    """Measure PyTorch from images in page-locked memory to rows on the host.

    Parameters
    ----------
    graph, parts
        The network and what follows it.
    images
        int8 [N, C, H, W].
    size
        Batch size; the network is compiled for it.
    seconds
        Of the measurement.

    Returns
    -------
    dict
        images_per_s and p50_ms; network_p50_ms, from the images to the heads, without NMS;
        compile_s, the time until the warm-up ended.
    """
    import torch

    torch.backends.cudnn.benchmark = True
    torch.compiler.reset()
    network = torch.compile(network_of(graph), dynamic=False)
    source = torch.from_numpy(images)
    batch = source.repeat(-(-size // len(source)), 1, 1, 1)[:size].pin_memory()
    priors = torch.tensor(parts.priors).cuda().view(2, -1)
    names = list(parts.heads)
    half = len(names) // 2

    def network_alone() -> Any:
        steps = batch.cuda(non_blocking=True)
        return network(steps.half().to(memory_format=torch.channels_last))

    def detect() -> None:
        heads = network_alone()
        ordered = [heads[name].contiguous() for name in names]
        rows = torch_detections(HeadSet(SSD_RESNET34, ordered[:half], ordered[half:], None), priors)
        torch.cat(rows).cpu()

    def wait_for_network() -> None:
        network_alone()
        torch.cuda.synchronize()

    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(_WARM_UP):
            detect()
        compiled = time.perf_counter() - start
        whole, part = _turns(detect, seconds), _turns(wait_for_network, seconds)
    return {
        "images_per_s": size * len(whole) / sum(whole),
        "p50_ms": 1e3 * float(np.median(whole)),
        "network_p50_ms": 1e3 * float(np.median(part)),
        "compile_s": compiled,
    }


def _turns(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each turn of some work, for so long."""
    turns: list[float] = []
    while sum(turns) < seconds or len(turns) < _WARM_UP:
        start = time.perf_counter()
        work()
        turns.append(time.perf_counter() - start)
    return turns


def network_of(graph: Int8Graph, device: str = "cuda") -> Callable[[Any], dict[str, Any]]:
    """Make a function of PyTorch from image steps, float16 [N, C, H, W], to the heads by name."""
    import torch
    from torch.nn import functional

    image_scale = graph.tensors[graph.image].scale or 1.0
    layers = []
    for layer in graph.layers:
        weight: Any = None
        bias: Any = None
        if isinstance(layer, Convolution):
            scale = graph.tensors[layer.x].scale or 1.0
            real = layer.weight * (layer.multiplier / scale)[:, None, None, None]
            half = torch.from_numpy(real).to(device, torch.float16)
            weight = half.to(memory_format=torch.channels_last)
            bias = torch.from_numpy(layer.bias).to(device, torch.float16)
        layers.append((layer, weight, bias))

    def forward(steps: Any) -> dict[str, Any]:
        values = {graph.image: steps * image_scale}
        for layer, weight, bias in layers:
            window, x = layer.window, values[layer.x]
            top, left, bottom, right = window.pads
            if isinstance(layer, Convolution):
                pads: Any = (top, left)
                if pads != (bottom, right):
                    x, pads = functional.pad(x, (left, right, top, bottom)), 0
                y = functional.conv2d(x, weight, bias, window.stride, pads, window.dilation)
                if layer.residual is not None:
                    y = y + values[layer.residual]
                values[layer.y] = functional.relu(y) if layer.relu else y
            else:
                target = graph.tensors[layer.y]
                x = functional.pad(x, (left, right, top, bottom), value=float("-inf"))
                y = functional.max_pool2d(x, window.kernel, window.stride)
                values[layer.y] = y[..., : target.height, : target.width]
        return {
            name: values[head.tensor][:, head.first : head.first + head.channels]
            for name, head in graph.heads.items()
        }

    return forward

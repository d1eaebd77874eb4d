"""What libnms_opt.so is measured against: PyTorch as users write it, and a multi-pass design.

The multi-pass design is that of NVIDIA's MLPerf plugin: decode every box, permute the logits to
[N, C, P], softmax, the best of each class in order, a block of threads for each class of each
image with a barrier for every kept box, the best of each image, rows. Each stage reads what the
one before wrote to memory.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from plugin_cuda.bench.loads import (
    CONFIDENCE_THRESHOLD,
    KEEP_TOP_K,
    LEVEL_TOP_K,
    LEVELS,
    NMS_THRESHOLD,
    NUM_CLASSES,
    STRETCH,
    TOP_K,
    HeadSet,
)

_THREADS = 256


def torch_detections(heads: HeadSet, priors: Any) -> list[Any]:
    """Decode, softmax and torchvision's batched_nms, image by image.

    Parameters
    ----------
    heads
        NCHW.
    priors
        float32 [2, P * 4].

    Returns
    -------
    list
        For each image rows of (ymin, xmin, ymax, xmax, score, label), float32 [at most 200, 6].
    """
    import torch
    from torchvision.ops import batched_nms

    corners, variances = priors.view(2, -1, 4)
    size = corners[:, 2:] - corners[:, :2]
    centre = (corners[:, 2:] + corners[:, :2]) / 2
    found = []
    for image in range(len(heads.loc[0])):
        loc = torch.cat([head[image].view(4, -1) for head in heads.loc], 1).float().T * variances
        conf = torch.cat([head[image].view(NUM_CLASSES, -1) for head in heads.conf], 1)
        middle = loc[:, :2] * size + centre
        reach = loc[:, 2:].exp() * size / 2
        boxes = torch.cat([middle - reach, middle + reach], 1)
        best, index = conf.float().softmax(0)[1:].topk(TOP_K, dim=1)  # background is class 0
        label, rank = (best > CONFIDENCE_THRESHOLD).nonzero(as_tuple=True)
        score, box = best[label, rank], boxes[index[label, rank]]
        kept = batched_nms(box, score, label, NMS_THRESHOLD)[:KEEP_TOP_K]
        rows = box[kept][:, [1, 0, 3, 2]].clamp(0, 1)
        found.append(torch.cat([rows, score[kept, None], label[kept, None] + 1], 1))
    return found


def retinanet_detections(heads: HeadSet, priors: Any) -> list[Any]:
    """Do what torchvision's RetinaNet does behind its heads, image by image.

    Parameters and result as of `torch_detections`; at most 300 rows.
    """
    import torch
    from torchvision.ops import batched_nms

    detector = heads.detector
    corners, _ = priors.view(2, -1, 4)
    size = corners[:, 2:] - corners[:, :2]
    centre = (corners[:, 2:] + corners[:, :2]) / 2
    found = []
    for image in range(len(heads.loc[0])):
        parts, first = [], 0
        for loc, conf in zip(heads.loc, heads.conf, strict=True):
            scores = conf[image].float().view(detector.num_classes, -1).sigmoid()
            deltas = loc[image].float().view(4, -1).T
            flat = scores.view(-1)
            (index,) = (flat > CONFIDENCE_THRESHOLD).nonzero(as_tuple=True)
            best, rank = flat[index].topk(min(LEVEL_TOP_K, len(index)))
            label, own = index[rank] // scores.shape[1], index[rank] % scores.shape[1]
            prior, delta = own + first, deltas[own]
            middle = delta[:, :2] * size[prior] + centre[prior]
            reach = delta[:, 2:].clamp(max=STRETCH).exp() * size[prior] / 2
            box = torch.cat([middle - reach, middle + reach], 1).clamp(0, 1)
            parts.append((box, best, label))
            first += scores.shape[1]
        box, score, label = (torch.cat(one) for one in zip(*parts, strict=True))
        kept = batched_nms(box, score, label, NMS_THRESHOLD)[: detector.options["keep_top_k"]]
        rows = box[kept][:, [1, 0, 3, 2]]
        found.append(torch.cat([rows, score[kept, None], label[kept, None]], 1))
    return found


class MultiPass:
    """The multi-pass design on one set of NCHW heads; `run` can be captured in a CUDA graph."""

    def __init__(self, heads: HeadSet, priors: Any) -> None:
        import torch

        self._kernels = _kernels(str(heads.conf[0].dtype))
        self._heads, self._priors = heads, priors
        self._batch = len(heads.loc[0])
        self._num_priors = priors.numel() // 8
        sizes = [anchors * height * width for anchors, height, width in LEVELS]
        rows = [
            (loc.data_ptr(), conf.data_ptr(), size, sum(sizes[:i]))
            for i, (loc, conf, size) in enumerate(zip(heads.loc, heads.conf, sizes, strict=True))
        ]
        self._table = torch.tensor(rows, dtype=torch.int64).cuda()
        self.detections = torch.empty((self._batch, KEEP_TOP_K, 7), device="cuda")
        self.count = torch.empty(self._batch, dtype=torch.int32, device="cuda")

    def run(self) -> None:
        """Enqueue everything on torch's current stream."""
        import torch

        priors, classes, batch = self._num_priors, NUM_CLASSES, self._batch
        boxes = torch.empty((batch, priors, 4), device="cuda")
        logits = torch.empty((batch, classes, priors), device="cuda")
        table = (self._table, len(LEVELS), priors)
        self._launch("decode", batch * priors, *table, batch, self._priors, boxes)
        self._launch("permute", logits.numel(), *table, classes, batch, logits)
        scores = logits.softmax(1)
        best, index = scores.topk(TOP_K, dim=2)
        self._launch(
            "suppress",
            (classes, batch),
            *(boxes, index, best, priors, classes, TOP_K, 0),
            *(CONFIDENCE_THRESHOLD, NMS_THRESHOLD),
            shared=TOP_K * 17,
        )
        rows, place = best.view(batch, -1).topk(KEEP_TOP_K, dim=1)
        self.detections.zero_()
        self.count.zero_()
        self._launch(
            "gather",
            (batch, 1),
            *(boxes, index, rows, place, priors, classes, TOP_K, KEEP_TOP_K),
            *(self.detections, self.count),
        )

    def _launch(
        self, name: str, work: int | tuple[int, int], *arguments: Any, shared: int = 0
    ) -> None:
        """Launch a kernel on so many threads, or on a grid of blocks."""
        import cupy
        import numpy as np
        import torch

        grid = work if isinstance(work, tuple) else (-(-work // _THREADS), 1)
        kinds = {int: np.int32, float: np.float32}
        values = tuple(
            np.uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else kinds[type(a)](a)
            for a in arguments
        )
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            self._kernels.get_function(name)(grid, (_THREADS,), values, shared_mem=shared)


@lru_cache
def _kernels(dtype: str) -> Any:
    """Compile multipass.cu for a type of the heads; every peer shares it."""
    import cupy

    source = Path(__file__).with_name("multipass.cu").read_text()
    options = ("--std=c++17", *(("-DHALF",) if dtype == "torch.float16" else ()))
    return cupy.RawModule(code=source, options=options)


def agreement(ours: Any, rows_of_image: list[Any]) -> float:
    """Share of the rows of our detections that a peer has, too, whatever their order.

    Parameters
    ----------
    ours
        detections of nms_opt.h, used rows alone or unused ones with label -1.
    rows_of_image
        The peer's rows (ymin, xmin, ymax, xmax, score, label) of each image.

    Returns
    -------
    float
        Rows with a counterpart of the same label, within 1e-4, over the larger number of rows.
    """
    matched = total = 0
    for rows, theirs in zip(ours, rows_of_image, strict=True):
        used = rows[rows[:, 6] >= 0, 1:]
        near = (used[:, None] - theirs[None]).abs().amax(2) < 1e-4
        matched += int(near.any(1).sum())
        total += max(len(used), len(theirs))
    return matched / max(total, 1)

"""Training pictures: worker processes compose scenes, the device keeps a pool of them.

The workers refresh the pool all the time; a training batch is drawn from it at random, cropped,
flipped and tinted on the device. So the device never waits for the workers, whatever their speed.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from demo.glyphs import Atlas
from demo.objective import IGNORED
from demo.scenes import MIN_VISIBLE, Scene, scenes, stream

MAX_OBJECTS = 16
"""Rows for objects per picture; a scene has fewer."""
CHUNK = 16
"""Scenes that a worker hands over at once."""

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]


def to_sample(scene: Scene, image_size: int) -> Sample:
    """Store and read back a scene as JPEG, then bring it to the network's input size.

    Returns
    -------
    image, boxes, classes
        RGB uint8 [S, S, 3]; float32 [MAX_OBJECTS, 4] ltrb, normalised; int64 [MAX_OBJECTS], 1..80,
        0 for an empty row, IGNORED for a crowd.
    """
    jpeg = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, scene.quality])[1]
    image = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
    height, width = image.shape[:2]
    image = cv2.resize(image, (image_size, image_size), interpolation=cv2.INTER_LINEAR)
    count = len(scene.boxes)
    boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
    boxes[:count] = scene.boxes
    boxes[:, 2:] += boxes[:, :2]
    boxes /= np.array([width, height, width, height], np.float32)
    classes = np.zeros(MAX_OBJECTS, np.int64)
    classes[:count] = np.where(scene.crowd, IGNORED, scene.classes + 1)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)), boxes, classes


class SceneSource(IterableDataset[Sample]):
    """Endless training samples; each worker process has its own random stream."""

    def __init__(self, atlas: Path, image_size: int, key: tuple[int, ...]) -> None:
        self.atlas = Atlas.load(atlas)
        self.image_size = image_size
        self.key = key

    def __iter__(self) -> Iterator[Sample]:
        cv2.setNumThreads(1)
        info = get_worker_info()
        rng = stream("train", *self.key, info.id if info else 0)
        for scene in scenes(rng, self.atlas):
            yield to_sample(scene, self.image_size)


class ScenePool:
    """Ring of samples on a device, refreshed by a thread.

    Attributes
    ----------
    made
        Scenes received from the workers so far.
    """

    def __init__(self, source: SceneSource, workers: int, capacity: int) -> None:
        # The workers fork here, before the process first touches CUDA.
        self._chunks = iter(DataLoader(source, batch_size=CHUNK, num_workers=workers))
        self._capacity = -(-capacity // CHUNK) * CHUNK
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.made = 0

    def start(self, device: torch.device, minimum: int) -> None:
        """Begin to fill the pool on ``device``; return once it holds ``minimum`` samples."""
        self._images: Tensor | None = None
        self._minimum = min(minimum, self._capacity)
        self._thread = threading.Thread(target=self._fill, args=(device,), daemon=True)
        self._thread.start()
        self._ready.wait()
        self._check()

    def stop(self) -> None:
        """End the thread; the workers end with the iterator."""
        self._stop.set()
        self._thread.join()
        del self._chunks

    def _check(self) -> None:
        if self._error is not None:
            raise RuntimeError("the scene workers failed") from self._error

    def _fill(self, device: torch.device) -> None:
        try:
            self._copy_chunks(device)
        except Exception as error:
            self._error = error
        self._ready.set()

    def _copy_chunks(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        copying = torch.cuda.Stream(device=device) if cuda else None  # type: ignore[no-untyped-call]
        for chunk in self._chunks:
            if self._stop.is_set():
                return
            if copying is None:
                parts = list(chunk)
            else:
                # A copy on the training stream would wait for the training steps queued there.
                with torch.cuda.stream(copying):
                    parts = [part.to(device) for part in chunk]
                copying.synchronize()
            with self._lock:
                if self._images is None:
                    self._images, self._boxes, self._classes = (
                        part.new_zeros((self._capacity, *part.shape[1:])) for part in parts
                    )
                first = self.made % self._capacity
                for ring, part in zip(
                    (self._images, self._boxes, self._classes), parts, strict=True
                ):
                    ring[first : first + CHUNK] = part
                    if copying is not None:
                        part.record_stream(torch.cuda.current_stream(device))
                self.made += CHUNK
            if self.made >= self._minimum:
                self._ready.set()

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw ``batch`` samples at random: images uint8 [N, S, S, 3], boxes, classes."""
        self._check()
        with self._lock:
            assert self._images is not None  # noqa: S101
            filled = min(self.made, self._capacity)
            index = torch.randint(filled, (batch,), device=self._images.device)
            return self._images[index], self._boxes[index], self._classes[index]


def augment(images: Tensor, boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Crop, flip and tint a batch on its device.

    Parameters
    ----------
    images
        uint8 [N, S, S, 3].
    boxes, classes
        As `to_sample` makes them, with a batch axis.

    Returns
    -------
    images float32 [N, 3, S, S] in 0..255, boxes clipped to the crop, classes; an object that the
    crop leaves less than MIN_VISIBLE of becomes IGNORED.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, device=device)

    # Half of the pictures whole, half cut; crop in the source's 0..1 coordinates.
    cut = (uniform(0, 1, 1) < 0.5).float()
    size = 1 - cut * uniform(0, 0.35, 2)
    start = (1 - size) * uniform(0, 1, 2)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)

    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0] = size[:, 0] * flip
    theta[:, 1, 1] = size[:, 1]
    theta[:, :, 2] = 2 * start + size - 1
    planes = images.permute(0, 3, 1, 2).float()
    grid = torch.nn.functional.affine_grid(theta, list(planes.shape), align_corners=False)
    planes = torch.nn.functional.grid_sample(
        planes, grid, padding_mode="border", align_corners=False
    )
    planes = planes * uniform(0.85, 1.15, 3, 1, 1) + uniform(-12, 12, 3, 1, 1)

    moved = (boxes - torch.cat([start, start], 1)[:, None]) / torch.cat([size, size], 1)[:, None]
    mirrored = torch.stack(
        [1 - moved[..., 2], moved[..., 1], 1 - moved[..., 0], moved[..., 3]], dim=-1
    )
    moved = torch.where(flip[:, None, None] < 0, mirrored, moved)
    clipped = moved.clamp(0, 1)
    area = (moved[..., 2:] - moved[..., :2]).prod(-1)
    visible = (clipped[..., 2:] - clipped[..., :2]).prod(-1)
    classes = torch.where((classes > 0) & (visible < MIN_VISIBLE * area), IGNORED, classes)
    classes = torch.where(visible <= 0, 0, classes)
    return planes.clamp(0, 255), clipped, classes

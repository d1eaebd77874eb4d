"""Base runs and compliance tests of a stand-in engine, for the tests of both."""

from __future__ import annotations

import json
import time

import numpy as np

from harness.data.dataset import Dataset
from harness.loadgen.settings import load_settings
from harness.results.run import Benchmark, run
from tests.support.harness_fakes import SHAPE, FakeEngine, Memory, detect

TOTAL = 75
SYSTEM = "box"


class CheatingEngine(FakeEngine):
    """Detects honestly until told to lie, or remembers images it has seen."""

    lie = ""
    remembers = False
    seen = frozenset()

    def infer(self, images):
        known = set(images[:, 0, 0, 0].tolist())
        if self.remembers and not known <= self.seen:
            time.sleep(0.015)
        self.seen = self.seen | known
        detections, counts = super().infer(images)
        if self.lie == "labels":
            detections[..., 6] = np.where(
                detections[..., 6] > 0, 1 + (detections[..., 6] + 39) % 80, detections[..., 6]
            )
        if self.lie == "last bits":
            detections[..., 5] *= np.float32(1 - 1e-6)
        return detections, counts


def data_set(folder):
    """Ground truth that is what the stand-in detects."""
    folder.mkdir(parents=True, exist_ok=True)
    files = Memory(TOTAL).files
    images, annotations = [], []
    for index, name in enumerate(files):
        images.append({"id": index, "file_name": name, "height": 100, "width": 200})
        detections, counts = detect(np.full((1, *SHAPE), index, np.float32))
        for _, ymin, xmin, ymax, xmax, _, label in detections[0, : counts[0]].tolist():
            box = [200 * xmin, 100 * ymin, 200 * (xmax - xmin), 100 * (ymax - ymin)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(label),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": str(number)} for number in range(1, 81)]
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (folder / "map.txt").write_text("".join(f"{name}\n" for name in files))
    return Dataset("demo-val", folder, folder / "map.txt", path)


def benchmark(folder, engine):
    return Benchmark((engine,), Memory(TOTAL), data_set(folder), 30)


def base_runs(bench, root, scenario, **more):
    """Both runs of a scenario, where ``harness run`` would leave them."""
    values = {"min_duration_ms": 200, "min_query_count": 100, **more}
    (settings,) = load_settings([scenario], None, values)
    folder = root / SYSTEM / "ssd-resnet34" / scenario
    for mode in ("PerformanceOnly", "AccuracyOnly"):
        run(bench, settings, mode, folder / mode)
    return folder

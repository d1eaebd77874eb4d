"""Data sets of a few pictures, and their preprocessing."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from engine.data.preprocessed import PreprocessedSet
from engine.protocol import InputSpec
from harness.data.dataset import Dataset
from harness.data.preprocess import preprocess

SPEC = InputSpec("image", (3, 96, 128), "float32")


def make_dataset(root: Path, images: dict[str, np.ndarray]) -> Dataset:
    (root / "images").mkdir(parents=True)
    for name, image in images.items():
        assert cv2.imwrite(str(root / "images" / name), image)
    (root / "map.txt").write_text("".join(f"{name}\n" for name in images))
    return Dataset("test", root / "images", root / "map.txt", None)


def run(
    dataset: Dataset, out_dir: Path, spec: InputSpec = SPEC, **options: bool
) -> PreprocessedSet:
    choices = {"overwrite": False, "skip_bad": False} | options
    return preprocess(dataset, spec, out_dir, workers=1, progress=False, say=print, **choices)


def write_times(out_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out_dir.glob("*.npy")}

"""A working directory with the demo benchmark cut small, for tests of the route."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support import ROOT

BENCHMARK = "ssd-resnet34-demo"
VAL, CAL = 4, 3

CONFIG = f"""
[system]
benchmark = "{BENCHMARK}"
cpu = ""

[default]
engine = "onnxruntime"
min_duration_ms = 300
min_query_count = 1

[default.Offline]
batch_size = 2

[default.Server]
target_qps = 5.0

[triton]
engine = "triton"
min_duration_ms = 300
min_query_count = 1
"""


def small_benchmark(place: Path, checkpoint: Path) -> Path:
    """Fill `place` with a checkpoint, some of the demo's images, and a system configuration."""
    demo = place / "demo"
    for split, count in (("val", VAL), ("cal", CAL)):
        names = (ROOT / "data_maps" / "demo" / f"{split}_map.txt").read_text().split()[:count]
        write_map(place, split, names)
        (demo / "data" / split).mkdir(parents=True)
        for name in names:
            shutil.copy(ROOT / "demo" / "data" / split / name, demo / "data" / split)
    (demo / "data" / "annotations").mkdir()
    source = json.loads((ROOT / "demo/data/annotations/instances_val.json").read_text())
    names = (place / "data_maps/demo/val_map.txt").read_text().split()
    source["images"] = [image for image in source["images"] if image["file_name"] in names]
    ids = {image["id"] for image in source["images"]}
    source["annotations"] = [a for a in source["annotations"] if a["image_id"] in ids]
    (demo / "data" / "annotations" / "instances_val.json").write_text(json.dumps(source))
    shutil.copy(checkpoint, demo / f"{BENCHMARK}.safetensors")
    (place / "configs").mkdir()
    (place / "configs" / "small.toml").write_text(CONFIG)
    return place


def write_map(place: Path, split: str, names: list[str]) -> None:
    path = place / "data_maps" / "demo" / f"{split}_map.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))

"""harness accuracy of RetinaNet on Open Images: what MLPerf's accuracy-openimages.py computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from harness.download.boxes import Box, coco_annotations
from harness.results.accuracy import evaluate
from tests.support import ROOT
from tests.support.grey import harness

CLASSES = (ROOT / "data_maps/openimages/classes.txt").read_text().splitlines()
SIZES = [(60, 80), (90, 50), (33, 71), (64, 64), (48, 96), (70, 40)]
FLAGS = dict.fromkeys(("IsOccluded", "IsInside", "IsDepiction", "IsTruncated"), 0)


def make(place: Path) -> tuple[Path, Path]:
    """Annotations and a log in the order of a map, whose detections are near the boxes or wrong.

    Some boxes are of groups, some images have no detection, one is logged twice.
    """
    random = np.random.default_rng(7)
    images = [f"{number:016x}" for number in random.permutation(40)]
    boxes = []
    for image in images:
        for _ in range(random.integers(1, 6)):
            x, y, w, h = random.uniform(0.1, 0.5, 4)
            corners = (float(x), float(y), float(x + w), float(y + h))
            flags = {**FLAGS, "IsGroupOf": int(random.random() < 0.2)}
            boxes.append(Box(image, int(random.choice([0, 1, 83, 263])), corners, flags))
    sizes = {image: SIZES[place % len(SIZES)] for place, image in enumerate(images)}
    content = coco_annotations(boxes, CLASSES, sizes)
    folder = place / "build" / "data" / "openimages"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "openimages-mlperf.json").write_text(json.dumps(content))
    names = [image["file_name"] for image in content["images"]]
    (folder / "val_map.txt").write_text("".join(f"{name}\n" for name in names))
    rows: dict[int, list[list[float]]] = {sample: [] for sample in range(len(names))}
    for box in boxes:
        sample = names.index(f"{box.image}.jpg")
        x0, y0, x1, y1 = np.array(box.corners) + random.normal(0, 0.01, 4)
        label = box.category if random.random() < 0.8 else int(random.integers(0, 264))
        if random.random() < 0.9:
            rows[sample].append([sample, y0, x0, y1, x1, random.random(), label])
    rows[5] = []
    records = [
        {"qsl_idx": sample, "data": np.array(of_sample, np.float32).tobytes().hex()}
        for sample, of_sample in rows.items()
    ]
    log = place / "mlperf_log_accuracy.json"
    log.write_text(json.dumps([*records, records[3]]))
    return folder / "annotations" / "openimages-mlperf.json", log


def by_pycocotools(annotations: Path, log: Path) -> list[float]:
    """COCOeval's numbers, each label taken for a category id, as there."""
    truth = COCO(annotations)
    results, seen = [], set()
    for record in json.loads(log.read_text()):
        image = truth.dataset["images"][record["qsl_idx"]]
        if image["id"] in seen:
            continue
        seen.add(image["id"])
        rows = np.frombuffer(bytes.fromhex(record["data"]), np.float32).reshape(-1, 7)
        for _, y0, x0, y1, x1, score, label in rows:
            left, top = x0 * image["width"], y0 * image["height"]
            size = [x1 * image["width"] - left, y1 * image["height"] - top]
            box = [float(value) for value in (left, top, *size)]
            found = {"image_id": image["id"], "category_id": int(label), "bbox": box}
            results.append({**found, "score": float(score)})
    found = COCOeval(truth, truth.loadRes(results), "bbox")
    found.params.imgIds = sorted(seen)
    found.evaluate()
    found.accumulate()
    found.summarize()
    return [float(value) for value in found.stats]


@pytest.mark.slow
def test_labels_are_the_category_ids(tmp_path: Path) -> None:
    annotations, log = make(tmp_path)
    wanted = by_pycocotools(annotations, log)
    assert 0.1 < wanted[0] < 0.9
    done = harness(tmp_path, "accuracy", log, "--dataset", "openimages")
    assert done.returncode == 0, done.stderr
    *stats, counts, last = done.stdout.splitlines()
    assert [float(line.split()[1]) for line in stats] == pytest.approx(wanted, abs=5.1e-5)
    assert counts.startswith("40 of 40 images")
    assert float(last.removeprefix("mAP=").rstrip("%")) == pytest.approx(100 * wanted[0], abs=6e-4)
    assert done.stderr == ""
    # what a log without a data set does not say
    done = harness(tmp_path, "accuracy", log, "--annotations", annotations, "--labels-from", "0")
    assert done.stdout.splitlines()[-1] == last


def test_labels_that_count_from_1_are_noticed(tmp_path: Path) -> None:
    annotations, log = make(tmp_path)
    records = json.loads(log.read_text())
    for record in records:
        rows = np.frombuffer(bytes.fromhex(record["data"]), np.float32).reshape(-1, 7).copy()
        rows[:, 6] += 1
        record["data"] = rows[rows[:, 6] < 264].tobytes().hex()
    log.write_text(json.dumps(records))
    found = evaluate(log, annotations, first_label=0)
    (said,) = (text for text in found.warnings if "would be" in text)
    assert "if labels are counted from 1; a row" in said
    assert said.endswith("label from 0")
    assert not any("would be" in text for text in evaluate(log, annotations).warnings)


def test_without_the_download_the_map_is_missed_by_name(tmp_path: Path) -> None:
    done = harness(tmp_path, "accuracy", "log.json", "--dataset", "openimages")
    assert done.returncode == 2
    assert "build/data/openimages/val_map.txt not found" in done.stderr
    assert "harness download data" in done.stderr

"""What is attacked: valid files, the functions of commands that read them, and oracles."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.data.coco import load_annotations, positions_by_name
from engine.manifest import load_manifest, manifest_path
from engine.model import load_detector
from engine.protocol import InputSpec
from engine.quantization.cache import Calibration, parse_trt
from engine.quantization.placement import find_placement
from graph_surgery.replace import insert_nms
from graph_surgery.survey import survey
from harness.data.dataset import load_map
from harness.data.transform import preprocess_image
from harness.loadgen.accuracy_log import read_accuracy_log
from harness.loadgen.log import read_detail
from harness.loadgen.settings import SCENARIOS, load_settings
from harness.make.system_config import read_config_file
from harness.results.accuracy import evaluate
from tests.support import ROOT
from tests.support.graphs import UNCAPPED, detector
from tests.support.manifests import manifest
from tests.support.nms_cases import (
    check_rows,
    columns_are_distinct,
    is_decided,
    make_model,
    random_heads,
    run,
    with_attributes,
)
from tests.support.nms_oracle import nms_opt

SPEC = InputSpec("image", (3, 16, 16), "float32")
CHECKPOINT = ROOT / "demo" / "ssd-resnet34-demo.safetensors"
IMAGE = sorted((ROOT / "demo" / "data" / "val").glob("*.jpg"))[0]
ANNOTATIONS = ROOT / "demo" / "data" / "annotations" / "instances_val.json"


@dataclass(frozen=True)
class Target:
    """A file that users give: what a valid one holds, and what reads it."""

    name: str
    content: Callable[[], bytes]
    read: Callable[[Path], object]
    is_model: bool = False


def _onnx(path: Path) -> None:
    given = load_detector(path)
    assert all(size > 0 for size in given.input.shape)
    survey(given.model)
    result = insert_nms(given.model)
    assert find_placement(result.model).layers


def _cache(path: Path) -> None:
    scales = Calibration.load(path).scales.values()
    assert all(0 < scale < np.inf for scale in scales)


def _cache_text() -> bytes:
    known = Calibration({"image": 0.02}, "minmax", 8, "1", "2", "3", {}, 0, {"a": 1.0}, {})
    with tempfile.TemporaryDirectory() as folder:
        known.save(path := Path(folder) / "cache.json")
        return path.read_bytes()


def _manifest(path: Path) -> None:
    engine = path.with_name("e.engine")
    path.replace(manifest_path(engine))
    known = load_manifest(engine)
    assert min(known.input.shape) > 0 < known.min_batch <= known.max_batch


def _settings(path: Path) -> None:
    for one in load_settings(list(SCENARIOS), path, {}):
        assert one.batch > 0


def _annotations(path: Path) -> None:
    content = load_annotations(path)
    positions_by_name(content["images"], path)


def _small_annotations() -> bytes:
    content = json.loads(ANNOTATIONS.read_bytes())
    images = content["images"][:3]
    kept = {image["id"] for image in images}
    boxes = [box for box in content["annotations"] if box["image_id"] in kept]
    return json.dumps({**content, "images": images, "annotations": boxes}).encode()


def _checkpoint(path: Path) -> None:
    from export.checkpoint import check_tensors, infer_config, read_checkpoint

    loaded = read_checkpoint(path)
    check_tensors(loaded, infer_config(loaded))


def _pickle() -> bytes:
    import torch
    from safetensors.torch import load_file

    buffer = io.BytesIO()
    torch.save(load_file(CHECKPOINT), buffer)
    return buffer.getvalue()


def _image(path: Path) -> None:
    out = np.full(SPEC.shape, np.nan, np.float32)
    preprocess_image(path, SPEC, out)
    assert np.isfinite(out).all()


def _log_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    corner, size = rng.uniform(0, 0.7, (count, 2)), rng.uniform(0.05, 0.3, (count, 2))
    rest = [rng.random((count, 1)), rng.integers(1, 5, (count, 1))]
    return np.hstack([np.zeros((count, 1)), corner, corner + size, *rest]).astype("<f4")


def _log(samples: dict[int, np.ndarray]) -> bytes:
    entries = []
    for sample, rows in samples.items():
        rows[:, 0] = sample
        entries.append({"seq_id": sample, "qsl_idx": sample, "data": rows.tobytes().hex()})
    return json.dumps(entries).encode()


def _detail() -> bytes:
    values = {"effective_scenario": "Offline", "result_validity": "VALID", "loadgen_version": "6"}
    lines = [
        json.dumps({"key": k, "value": v, "metadata": {"is_error": False}})
        for k, v in values.items()
    ]
    return "".join(f":::MLLOG {line}\n" for line in lines).encode()


TARGETS = (
    Target(
        "onnx",
        detector(replace(UNCAPPED, norms=True, opset=18)).SerializeToString,
        _onnx,
        is_model=True,
    ),
    Target(
        "surgered",
        insert_nms(detector(replace(UNCAPPED, norms=True, opset=18))).model.SerializeToString,
        _onnx,
        is_model=True,
    ),
    Target("cache", _cache_text, _cache),
    Target(
        "trt-cache",
        lambda: b"TRT-100000-MinMaxCalibration\na: 3c010a14\n",
        lambda p: parse_trt(p.read_text(errors="replace")),
    ),
    Target("manifest", lambda: json.dumps(manifest().to_dict()).encode(), _manifest),
    Target("system", (ROOT / "configs" / "cpu-demo.toml").read_bytes, read_config_file),
    Target("settings", lambda: b"batch_size = 8\n[Server]\ntarget_qps = 5.0\n", _settings),
    Target("map", lambda: b"a.jpg\nb.jpg\n", load_map),
    Target("annotations", _small_annotations, _annotations),
    Target("safetensors", CHECKPOINT.read_bytes, _checkpoint),
    Target("pickle", _pickle, _checkpoint),
    Target("image", IMAGE.read_bytes, _image),
    Target(
        "accuracy-log", lambda: _log({0: _log_rows(np.random.default_rng(0), 3)}), read_accuracy_log
    ),
    Target("detail-log", _detail, read_detail),
)


def nms_is_the_oracle(rng: np.random.Generator, _: Path) -> bool:
    """Rows of the operator's definition in ONNX Runtime are those of its rules, loop by loop."""
    levels = [(int(rng.integers(1, 3)), *map(int, rng.integers(1, 4, 2))) for _ in range(2)]
    classes = int(rng.integers(2, 5))
    attributes = with_attributes(
        levels,
        numClasses=classes,
        topK=int(rng.integers(1, 9)),
        keepTopK=int(rng.integers(1, 20)),
        confidenceThreshold=round(float(rng.uniform(0.05, 0.5)), 2),
        nmsThreshold=round(float(rng.uniform(0.1, 0.9)), 2),
    )
    _, priors, loc, conf = random_heads(levels, classes, 2, seed=int(rng.integers(2**32)))
    if not (is_decided(attributes, priors, loc, conf) and columns_are_distinct(conf)):
        return False
    check_rows(
        *run(make_model(attributes, levels, priors), levels, loc, conf),
        *nms_opt(attributes, priors, loc, conf),
    )
    return True


def map_is_pycocotools(rng: np.random.Generator, folder: Path) -> bool:
    """A log's mAP is that of its rows, given to pycocotools as it reads results."""
    import contextlib

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    (folder / "a.json").write_bytes(_small_annotations())
    content = load_annotations(folder / "a.json")
    samples = {n: _log_rows(rng, int(rng.integers(0, 9))) for n in range(len(content["images"]))}
    for number, image in enumerate(content["images"]):  # some are right
        for box in content["annotations"]:
            if box["image_id"] == image["id"] and rng.random() < 0.7:
                x, y, w, h = box["bbox"]
                scale = [image["height"], image["width"]] * 2
                label = [one["id"] for one in content["categories"]].index(box["category_id"]) + 1
                row = [0, *np.divide([y, x, y + h, x + w], scale), rng.random(), label]
                samples[number] = np.vstack([samples[number], np.float32(row)]).astype("<f4")
    log = folder / "log.json"
    log.write_bytes(_log(samples))
    results = []
    for number, rows in samples.items():
        image = content["images"][number]
        for _, *corners, score, label in rows:
            size = np.float32([image["height"], image["width"]] * 2)
            y0, x0, y1, x1 = np.float32(corners) * size
            category = content["categories"][int(label) - 1]["id"]
            bbox = [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]
            one = {"image_id": image["id"], "category_id": category, "bbox": bbox}
            results.append({**one, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "a.json"))
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert abs(evaluate(log, folder / "a.json").mAP - judge.stats[0]) < 1e-6
    return True


ORACLES = {"nms": nms_is_the_oracle, "mAP": map_is_pycocotools}

"""The accuracy of a log against pycocotools driven by hand, and logs that are wrong."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from engine.data.coco import STATS, coco_stats
from harness.errors import HarnessError
from harness.loadgen.accuracy_log import read_accuracy_log
from harness.results.accuracy import evaluate

CATEGORY_IDS = [1, 3, 90, 13, 27]  # with gaps, and not sorted

Row = tuple[float, float, float, float, float, float, float]
Record = tuple[int, bytes]


def payload(rows: list[Row]) -> bytes:
    return b"".join(struct.pack("<7f", *row) for row in rows)


def write_log(path: Path, records: list[Record]) -> Path:
    """As LoadGen writes it."""
    lines = [
        f'{{ "seq_id" : {number}, "qsl_idx" : {sample}, "data" : "{data.hex().upper()}" }}'
        for number, (sample, data) in enumerate(records)
    ]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return path


@dataclass
class Scene:
    """A small data set with an imperfect detector's records."""

    annotations: Path
    content: dict[str, Any]
    records: list[Record]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    rng = np.random.default_rng(7)
    images, annotations, records = [], [], []
    for index in range(14):
        height, width = int(rng.integers(90, 700)), int(rng.integers(90, 700))
        image_id = 1000 - 13 * index
        images.append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width}
        )
        rows: list[Row] = []
        for _ in range(0 if index == 4 else int(rng.integers(1, 12))):
            label = int(rng.integers(len(CATEGORY_IDS)))
            w, h = rng.uniform(0.03, 0.5, 2) * (width, height)
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [x, y, w, h],
                    "area": w * h * 0.8,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            box = np.array([y / height, x / width, (y + h) / height, (x + w) / width])
            for _ in range(rng.integers(0, 4)):  # missed, found, found twice, ...
                moved = box + rng.normal(0, 0.02, 4)
                guess = label if rng.random() < 0.8 else int(rng.integers(len(CATEGORY_IDS)))
                # scores in steps, so that some tie
                rows.append((index, *moved, round(rng.uniform(0.05, 1), 1), guess + 1))
        if index != 9:
            records.append((index, payload(rows)))
    records.append((9, b""))
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": f"c{c}"} for c in CATEGORY_IDS],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return Scene(path, content, records)


def by_hand(scene: Scene, records: list[Record]) -> list[float]:
    """The rules of MLPerf's accuracy script, row by row, through COCO.loadRes."""
    truth = COCO(str(scene.annotations))
    inv_map = [0, *truth.getCatIds()]
    images = truth.dataset["images"]
    results, image_ids, seen = [], set(), set()
    for sample, data in records:
        if sample in seen:
            continue
        seen.add(sample)
        image = images[sample]
        image_ids.add(image["id"])
        values = np.frombuffer(data, np.float32)
        if len(values) < 7:
            continue
        for start in range(0, len(values), 7):
            _, ymin, xmin, ymax, xmax, score, label = values[start : start + 7]
            ymin, ymax = ymin * image["height"], ymax * image["height"]
            xmin, xmax = xmin * image["width"], xmax * image["width"]
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": inv_map[int(label)],
                    "bbox": [float(xmin), float(ymin), float(xmax - xmin), float(ymax - ymin)],
                    "score": float(score),
                }
            )
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.params.imgIds = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def check(scene: Scene, records: list[Record], tmp_path: Path) -> Any:
    result = evaluate(write_log(tmp_path / "log.json", records), scene.annotations)
    expected = by_hand(scene, records)
    assert [result.stats[name] for name in STATS] == pytest.approx(expected, abs=1e-12)
    assert (result.mAP, result.AP50) == (result.stats["AP"], result.stats["AP50"])
    assert 0.05 < result.mAP < 0.95
    return result


# The number


def test_full_log(scene: Scene, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate(write_log(tmp_path / "log.json", scene.records), scene.annotations)
    assert capfd.readouterr() == ("", "")
    result = check(scene, scene.records, tmp_path)
    assert (result.images_seen, result.images_total) == (14, 14)
    assert result.detections == sum(len(data) for _, data in scene.records) // 28
    assert result.empties == sum(not data for _, data in scene.records)
    assert (result.duplicates, result.warnings) == (0, ())


def test_repeated_samples_count_once(scene: Scene, tmp_path: Path) -> None:
    wrong = payload([(0, 0.1, 0.1, 0.2, 0.2, 0.99, 1)])
    records = [*scene.records, (0, wrong), *scene.records[:3], (9, wrong)]
    result = check(scene, records, tmp_path)
    assert result.duplicates == 5
    plain = evaluate(write_log(tmp_path / "log.json", scene.records), scene.annotations)
    assert result.stats == plain.stats
    first_wrong = check(scene, [(9, wrong), *scene.records], tmp_path)
    assert first_wrong.detections == plain.detections + 1


def test_partial_log_evaluates_what_it_holds(scene: Scene, tmp_path: Path) -> None:
    result = check(scene, scene.records[2:8], tmp_path)
    assert (result.images_seen, result.images_total) == (6, 14)
    assert "only 6 of 14 images" in result.warnings[0]
    full = evaluate(write_log(tmp_path / "log.json", scene.records), scene.annotations)
    assert result.mAP != full.mAP


def test_an_empty_payload_is_a_missed_image(scene: Scene, tmp_path: Path) -> None:
    emptied = [(sample, b"" if sample < 5 else data) for sample, data in scene.records]
    result = check(scene, emptied, tmp_path)
    assert result.images_seen == 14
    left_out = check(scene, [(s, d) for s, d in scene.records if s >= 5], tmp_path)
    assert result.mAP < left_out.mAP


def test_fewer_than_seven_floats_are_no_detection(scene: Scene, tmp_path: Path) -> None:
    records = [(sample, data if sample else bytes(24)) for sample, data in scene.records]
    assert (
        check(scene, records, tmp_path).stats
        == check(
            scene, [(sample, data if sample else b"") for sample, data in scene.records], tmp_path
        ).stats
    )


def test_background_rows_match_nothing(scene: Scene, tmp_path: Path) -> None:
    sample, data = scene.records[0]
    extra = payload([(sample, 0.0, 0.0, 0.5, 0.5, 0.999, 0)])
    result = check(scene, [(sample, data + extra), *scene.records[1:]], tmp_path)
    assert "1 rows have the background label" in result.warnings[0]


def test_categories_numbered_from_zero() -> None:
    """Label 1 is the first of them, and the background is none."""
    boxes = [[0, 0, 50, 50], [50, 50, 50, 50]]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 100, "width": 100}],
        "categories": [{"id": number, "name": str(number)} for number in range(2)],
        "annotations": [
            {"id": 1 + c, "image_id": 1, "category_id": c, "bbox": b, "area": 2500, "iscrowd": 0}
            for c, b in enumerate(boxes)
        ],
    }
    rows = np.array([(0, 0, 0, 0.5, 0.5, 0.9, 1), (0, 0.5, 0.5, 1, 1, 0.9, 2)], np.float32)
    assert coco_stats(content, content["images"], rows)["AP"] == pytest.approx(1)
    rows[0, 6] = 0
    assert coco_stats(content, content["images"], rows)["AP"] == pytest.approx(0.5)
    rows[1, 6] = 0
    assert coco_stats(content, content["images"], rows)["AP"] == 0


def test_rows_of_another_sample_are_counted(scene: Scene, tmp_path: Path) -> None:
    sample, data = scene.records[0]
    extra = payload([(sample + 1, 0.0, 0.0, 0.5, 0.5, 0.999, 2)] * 2)
    result = check(scene, [(sample, data + extra), *scene.records[1:]], tmp_path)
    assert "2 rows name another sample" in result.warnings[0]


def test_pixel_coordinates_are_said(scene: Scene, tmp_path: Path) -> None:
    sample, data = scene.records[0]
    extra = payload([(sample, 20.0, 30.0, 120.0, 140.0, 0.3, 2)] * 3)
    result = check(scene, [(sample, data + extra), *scene.records[1:]], tmp_path)
    assert "3 rows have coordinates far outside" in result.warnings[0]


def test_perfect_detections_are_mapped_over_the_gaps(scene: Scene, tmp_path: Path) -> None:
    images = {image["id"]: image for image in scene.content["images"]}
    samples = {image_id: sample for sample, image_id in enumerate(images)}
    records: dict[int, bytes] = dict.fromkeys(samples.values(), b"")
    for entry in scene.content["annotations"]:
        image = images[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        height, width = image["height"], image["width"]
        sample = samples[image["id"]]
        label = CATEGORY_IDS.index(entry["category_id"]) + 1
        row = (sample, y / height, x / width, (y + h) / height, (x + w) / width, 0.9, label)
        records[sample] += payload([row])
    log = write_log(tmp_path / "log.json", list(records.items()))
    assert evaluate(log, scene.annotations).mAP == pytest.approx(1.0)


def test_labels_from_0_are_the_categories_in_order(scene: Scene, tmp_path: Path) -> None:
    """As those of a model without background; the last category's label is then one less."""
    log = write_log(tmp_path / "log.json", scene.records)
    rows = [np.frombuffer(data, np.float32).reshape(-1, 7).copy() for _, data in scene.records]
    for of_sample in rows:
        of_sample[:, 6] -= 1
    records = [(s, r.tobytes()) for (s, _), r in zip(scene.records, rows, strict=True)]
    from_0 = write_log(tmp_path / "from-0.json", records)
    wanted = evaluate(log, scene.annotations)
    assert wanted.mAP > 0.1
    assert evaluate(from_0, scene.annotations, first_label=0) == wanted
    with pytest.raises(HarnessError, match=rf"label outside 0\.\.{len(CATEGORY_IDS) - 1}"):
        evaluate(log, scene.annotations, first_label=0)


def test_no_detection_at_all_is_zero(scene: Scene, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.json", [(sample, b"") for sample, _ in scene.records])
    result = evaluate(log, scene.annotations)
    assert (result.mAP, result.AP50, result.empties) == (0.0, 0.0, 14)
    assert result.warnings == ("no image has a detection",)


def test_no_ground_truth_is_said(scene: Scene, tmp_path: Path) -> None:
    row = (4, 0.1, 0.1, 0.4, 0.4, 0.8, 1)
    result = evaluate(write_log(tmp_path / "log.json", [(4, payload([row]))]), scene.annotations)
    assert result.mAP == -1
    assert any("no ground truth" in warning for warning in result.warnings)


def test_files_give_the_images(scene: Scene, tmp_path: Path) -> None:
    plain = evaluate(write_log(tmp_path / "log.json", scene.records), scene.annotations)
    names = [image["file_name"] for image in scene.content["images"]]
    order = np.random.default_rng(1).permutation(len(names)).tolist()
    records = [(order.index(sample), data) for sample, data in scene.records]
    log = write_log(tmp_path / "log.json", records)
    shuffled = evaluate(log, scene.annotations, [names[index] for index in order])
    assert shuffled.stats == plain.stats
    assert evaluate(log, scene.annotations).mAP < 0.5 * plain.mAP
    with pytest.raises(HarnessError, match=r"lacks 1 images of the log, the first is new\.jpg"):
        evaluate(log, scene.annotations, ["new.jpg", *(names[index] for index in order[1:])])


def test_skipped_images_are_missed_in_the_count(scene: Scene, tmp_path: Path) -> None:
    names = [image["file_name"] for image in scene.content["images"]]
    records = [(sample - 1, data) for sample, data in scene.records if sample]
    log = write_log(tmp_path / "log.json", records)
    result = evaluate(log, scene.annotations, names[1:])
    expected = by_hand(scene, [record for record in scene.records if record[0]])
    assert result.mAP == pytest.approx(expected[0], abs=1e-12)
    assert "only 13 of 14 images" in result.warnings[0]


def test_annotation_id_zero_is_said(scene: Scene, tmp_path: Path) -> None:
    scene.content["annotations"][0]["id"] = 0
    scene.annotations.write_text(json.dumps(scene.content))
    result = check(scene, scene.records, tmp_path)
    assert "annotation id 0" in result.warnings[0]


# Logs that are wrong


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON"),
        ('[\n{ "seq_id" : 0, "qsl_idx" : 0, "data" : "0000', "did the run end properly"),
        ("{}", "no JSON list"),
        ("[\n]\n", "no samples; was this an accuracy run"),
        ("[1]", "record 0 is no object"),
        ('[{"data": ""}]', "qsl_idx is None"),
        ('[{"qsl_idx": -1, "data": ""}]', "qsl_idx is -1"),
        ('[{"qsl_idx": 1.0, "data": ""}]', r"qsl_idx is 1\.0"),
        ('[{"qsl_idx": true, "data": ""}]', "qsl_idx is True"),
        ('[{"qsl_idx": 99999999999999999999, "data": ""}]', "qsl_idx is 9999"),
        ('[{"qsl_idx": 14, "data": ""}]', "qsl_idx 14 is out of range, the data set has 14"),
        ('[{"qsl_idx": 3}]', r"qsl_idx 3\): data is not hexadecimal"),
        ('[{"qsl_idx": 3, "data": "0G"}]', r"qsl_idx 3\): data is not hexadecimal"),
        ('[{"qsl_idx": 3, "data": "000"}]', r"qsl_idx 3\): data is not hexadecimal"),
        ('[{"qsl_idx": 3, "data": "000000"}]', "3 bytes of data are no whole number"),
        ('[{"qsl_idx": 3, "data": "' + "00" * 32 + '"}]', "32 bytes of data are no whole number"),
        ('[{"qsl_idx": 3, "data": "' + "00" * 28 * 200 + '00000000"}]', "5604 bytes"),
    ],
)
def test_unusable_logs(scene: Scene, tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(HarnessError, match=problem) as caught:
        evaluate(path, scene.annotations)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ((3, 0, 0, 1, 1, 0.5, 6), r"label outside 1\.\.5, the first is 6 of qsl_idx 3"),
        ((3, 0, 0, 0, 0, 0, -1), r"the first is -1 of qsl_idx 3; were padding rows logged"),
        ((3, 0, 0, 1, 1, 0.5, 1.5), r"the first is 1\.5 of"),
        ((3, 0, 0, float("nan"), 1, 0.5, 1), "1 detection rows hold NaN .* qsl_idx 3"),
        ((3, 0, 0, 1, 1, float("inf"), 1), "infinite"),
    ],
)
def test_unusable_rows(scene: Scene, tmp_path: Path, row: Row, problem: str) -> None:
    log = write_log(tmp_path / "log.json", [*scene.records[:3], (3, payload([row]))])
    with pytest.raises(HarnessError, match=problem):
        evaluate(log, scene.annotations)


def test_missing_log(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="not found"):
        evaluate(tmp_path / "log.json", scene.annotations)


VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
SAMPLES = st.integers(0, 20)
RECORDS = st.lists(st.tuples(SAMPLES, st.lists(st.lists(VALUES, min_size=6, max_size=6))))


@given(RECORDS.filter(len))
def test_parsing_returns_what_was_written(tmp_path: Path, records: list[Any]) -> None:
    encoded = [(sample, payload([(sample, *row) for row in rows])) for sample, rows in records]
    log = read_accuracy_log(write_log(tmp_path / "log.json", encoded))
    first: dict[int, list[list[float]]] = {}
    for sample, rows in records:
        first.setdefault(sample, rows)
    assert log.samples == tuple(first)
    assert log.rows.tolist() == [[sample, *row] for sample, rows in first.items() for row in rows]
    assert log.duplicates == len(records) - len(first)
    assert log.empties == sum(not rows for rows in first.values())
    assert log.mismatches == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**6), st.sampled_from(["cut", "set", "insert"]), st.integers(0, 255)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_logs_are_user_errors(
    scene: Scene, tmp_path: Path, damages: list[tuple[int, str, int]]
) -> None:
    path = write_log(tmp_path / "log.json", scene.records[:4])
    data = bytearray(path.read_bytes())
    for where, how, byte in damages:
        position = where % (len(data) + 1)
        if how == "cut":
            del data[position:]
        elif how == "set":
            data[position : position + 1] = bytes([byte])
        else:
            data[position:position] = bytes([byte])
    path.write_bytes(data)
    try:
        result = evaluate(path, scene.annotations)
    except HarnessError as error:
        assert "\n" not in str(error)
    else:
        assert result.images_seen <= 4

"""harness download data of Open Images: from a local server to annotations that are MLPerf's."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.coco import load_annotations
from engine.protocol import InputSpec
from harness.benchmarks import BENCHMARKS
from harness.data.dataset import check_annotated, known_dataset, load_map
from harness.data.preprocess import preprocess
from harness.data.transform import decode
from harness.download import files, openimages, transfer
from harness.download.boxes import coco_annotations, read_boxes
from harness.download.download import download_data
from harness.download.record import load_record
from harness.errors import HarnessError
from tests.support import ROOT
from tests.support.http_files import answers, running_site

CLASSES = (ROOT / "data_maps/openimages/classes.txt").read_text().splitlines()
BOXES_CSV, CLASSES_CSV = (
    f"/openimages/v5/{name}"
    for name in ("validation-annotations-bbox.csv", "class-descriptions-boxable.csv")
)
FOLDER = Path("build/data/openimages")
HEAD = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,"
HEAD += "IsDepiction,IsInside"
LABELS = {name: f"/m/0{number:03x}" for number, name in enumerate(CLASSES)}
C, A, B = "c0ffee0000000001", "000000000000000a", "00000000000000b0"
ROWS = f"""{HEAD}
{C},xclick,{LABELS["Zucchini"]},1,0.25,0.75,0.5,1,0,1,1,0,0
{A},xclick,/m/other,1,0,1,0,1,0,0,0,0,0
{C},xclick,/m/other,1,0,1,0,1,0,0,0,0,0
{A},freeform,{LABELS["Egg (Food)"]},1,0.1,0.3,0.2,0.6,1,0,0,0,1
{C},xclick,{LABELS["Airplane"]},1,0,1,0,1,-1,-1,0,1,0
ffffffffffffffff,xclick,/m/other,1,0,1,0,1,0,0,0,0,0
{B},xclick,{LABELS["Airplane"]},1,0.5,0.75,0.25,0.5,0,0,0,0,0
"""


def jpeg(width, height, turned=False):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    exif, out = Image.Exif(), io.BytesIO()
    if turned:
        exif[0x0112] = 6  # orientation: to be turned by a quarter
    Image.fromarray(pixels).save(out, "JPEG", exif=exif)
    return out.getvalue()


IMAGES = {C: jpeg(40, 20), A: jpeg(10, 30), B: jpeg(16, 8, turned=True)}
CAL = load_map(ROOT / "data_maps/openimages/cal_map.txt")


def descriptions(names=CLASSES):
    out = io.StringIO()
    csv.writer(out).writerows([("/m/other", "Other"), *((LABELS[name], name) for name in names)])
    return out.getvalue()


@pytest.fixture
def site(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0))
    monkeypatch.chdir(tmp_path)  # outside of a checkout: maps are those of the package
    monkeypatch.setattr(openimages, "load_map", lambda path: load_map(path)[:12])
    with running_site() as site:
        site.files = {BOXES_CSV: ROWS.encode(), CLASSES_CSV: descriptions().encode()}
        site.files |= {f"/validation/{image}.jpg": data for image, data in IMAGES.items()}
        site.files |= {f"/train/{name}": f"cal {name}".encode() for name in CAL[:12]}
        yield site


def get(site):
    notes = []
    done = download_data(BENCHMARKS["retinanet"], Path("build"), site.url, notes.append)
    # these sites have a part of it alone, which is said last
    assert notes.pop().endswith("the benchmark 24781: what is measured on them is not its mAP")
    return [item.new for item in done], notes


def entry(number, image, category, bbox, **flags):
    flags = {key: flags.get(key, 0) for key in ("Occluded", "Inside", "Depiction", "Truncated")} | {
        "GroupOf": flags.get("GroupOf", 0)
    }
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": flags["GroupOf"],
        **{f"Is{key}": value for key, value in flags.items()},
    }


def picture(number, image, width, height):
    file = {"id": number, "file_name": f"{image}.jpg", "height": height, "width": width}
    return file | {"license": None, "coco_url": None}


TEN_BY_THIRTY = [0.1 * 10, 0.2 * 30, (0.3 - 0.1) * 10, (0.6 - 0.2) * 30]
WANTED = {
    "info": {"dataset": "openimages_mlperf", "version": "v6"},
    "licenses": [],
    "categories": [{"id": i, "name": n, "supercategory": None} for i, n in enumerate(CLASSES)],
    # by ImageID; B's 16x8 as its EXIF data turns it
    "images": [picture(1, A, 10, 30), picture(2, B, 8, 16), picture(3, C, 40, 20)],
    # numbered in the order of the file, boxes of other classes left out
    "annotations": [
        entry(2, 1, 83, TEN_BY_THIRTY, Occluded=1, Inside=1),
        entry(4, 2, 0, [4.0, 4.0, 2.0, 4.0]),
        entry(1, 3, 263, [10.0, 10.0, 20.0, 10.0], GroupOf=1, Truncated=1),
        entry(3, 3, 0, [0.0, 0.0, 40.0, 20.0], Occluded=-1, Truncated=-1, Depiction=1),
    ],
}


def test_the_shipped_lists_are_the_benchmarks():
    assert len(CLASSES) == len(set(CLASSES)) == 264
    assert sorted(CLASSES) == CLASSES
    assert (CLASSES[0], CLASSES[83], CLASSES[263]) == ("Airplane", "Egg (Food)", "Zucchini")
    assert len(CAL) == 500
    assert (CAL[0], CAL[-1]) == ("dd51a1780bcb3d28.jpg", "da8bcebd4d5da553.jpg")


def test_open_images_are_put_where_mlperf_puts_them(site):
    assert get(site) == ([1, 3, 12], [])
    text = (FOLDER / "annotations/openimages-mlperf.json").read_text()
    assert text == json.dumps(WANTED)  # the order of the keys, too
    assert load_map(FOLDER / "val_map.txt") == tuple(f"{image}.jpg" for image in (A, B, C))
    for image, data in IMAGES.items():
        assert (FOLDER / f"validation/data/{image}.jpg").read_bytes() == data
    assert sorted(CAL[:12]) == sorted(path.name for path in FOLDER.glob("calibration/data/*"))
    assert not list(FOLDER.rglob("*.part*"))
    assert {"annotations/openimages-mlperf.json", f"validation/data/{A}.jpg"} < {
        *load_record(FOLDER)
    }
    assert sorted(path.name for path in Path().iterdir()) == ["build"]


def test_sizes_are_those_that_preprocessing_decodes(site):
    get(site)
    val = known_dataset("openimages", "val", Path("build"))
    for image in load_annotations(val.annotations)["images"]:
        shape = decode((val.image_dir / image["file_name"]).read_bytes()).shape
        assert (image["height"], image["width"]) == shape[:2]
    check_annotated(val)
    spec = InputSpec("images", (3, 8, 8), "float32")
    made = preprocess(
        *(val, spec, Path("made")),
        workers=1,
        overwrite=False,
        skip_bad=False,
        progress=False,
        say=print,
    )
    assert made.files == tuple(f"{image}.jpg" for image in (A, B, C))


def test_second_run_asks_the_server_nothing(site):
    get(site)
    site.requests.clear()
    (FOLDER / "val_map.txt").unlink()
    assert get(site) == ([0, 0, 0], [])
    assert site.requests == []
    assert load_map(FOLDER / "val_map.txt") == tuple(f"{image}.jpg" for image in (A, B, C))


def test_a_run_goes_on_where_one_stopped(site):
    site.faults[f"/validation/{B}.jpg"] = [answers(404)]
    with pytest.raises(HarnessError, match=rf"{B}.jpg: .* 404.*s3://open-images-dataset.*--mirror"):
        get(site)
    assert not (FOLDER / "annotations/openimages-mlperf.json").exists()
    assert not (FOLDER / "val_map.txt").exists()
    there = {path.name for path in FOLDER.rglob("*.jpg")}
    assert there == {name.rpartition("/")[2] for name in load_record(FOLDER) if "jpg" in name}
    site.requests.clear()
    assert get(site)[1] == []
    asked = {path.rpartition("/")[2] for path in site.paths()}
    assert not asked & there
    assert not {BOXES_CSV, CLASSES_CSV} & {*site.paths()}
    assert json.loads((FOLDER / "annotations/openimages-mlperf.json").read_text()) == WANTED


def test_what_mlperfs_own_script_left_is_used(site):
    """Annotations and images of a subset, as of its --max-images."""
    (FOLDER / "annotations").mkdir(parents=True)
    some = WANTED | {"images": WANTED["images"][::2]}
    some["annotations"] = [one for one in WANTED["annotations"] if one["image_id"] != 2]
    (FOLDER / "annotations/openimages-mlperf.json").write_text(json.dumps(some))
    new, notes = get(site)
    assert new == [0, 2, 12]
    assert "openimages-mlperf.json found; SHA-256 now recorded" in notes[0]
    assert BOXES_CSV not in site.paths()
    assert load_map(FOLDER / "val_map.txt") == (f"{A}.jpg", f"{C}.jpg")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("boxes", ROWS.replace("XMin", "left"), r"bbox\.csv has no column XMin"),
        ("boxes", ROWS.replace(C, "../../x"), r"line 2: ImageID '../../x' is none"),
        ("boxes", ROWS.replace("0.25,0.75", "a,0.75"), "line 2: could not convert"),
        ("boxes", ROWS.replace("0.25,0.75", "nan,0.75"), "line 2: a corner that is no number"),
        ("boxes", ROWS.replace("0,1,1,0,0\n", "0,1,-1,0,0\n"), "line 2: IsGroupOf is -1"),
        ("boxes", ROWS.replace("0,1,1,0,0\n", "0,1\n"), "line 2: 10 values, not 13"),
        ("boxes", ROWS[:-8], "line 8: 10 values, not 13"),
        ("boxes", HEAD, "has no box of the 264 classes"),
        ("boxes", "\0", "is it of Open Images' boxes"),
        ("classes", descriptions(CLASSES[1:]), "describes no 'Airplane'$"),
        ("classes", descriptions(CLASSES[2:]), "describes no 'Airplane', nor 1 other classes"),
        ("classes", '"', r"boxable\.csv cannot be read"),
    ],
)
def test_tables_that_are_others(site, name, content, problem):
    site.files[BOXES_CSV if name == "boxes" else CLASSES_CSV] = content.encode()
    with pytest.raises(HarnessError, match=problem) as caught:
        get(site)
    assert "\n" not in str(caught.value)
    assert not any(path.endswith(".jpg") for path in site.paths())


def test_an_image_that_cannot_be_decoded(site):
    site.files[f"/validation/{A}.jpg"] = b"no image"
    with pytest.raises(HarnessError, match=rf"{A}\.jpg cannot be decoded; move it away"):
        get(site)
    assert not (FOLDER / "annotations/openimages-mlperf.json").exists()


def test_disk_space_is_asked_for_first(site, monkeypatch):
    monkeypatch.setattr(openimages, "_IMAGE_SIZE", 10**12)
    # 24,781 images and those for calibration, before it is known which they are
    with pytest.raises(HarnessError, match=r"24,793,000,150 MB needed"):
        get(site)
    assert site.requests == []


def test_records_are_kept_meanwhile(site, monkeypatch):
    """So that a run that is killed after hours leaves few files without a record."""
    monkeypatch.setattr(files, "_RECORDED", 2)
    kept = []
    save = files.save_record
    monkeypatch.setattr(files, "save_record", lambda *a: (kept.append(len(a[1])), save(*a)))
    get(site)
    assert len(kept) >= 2 + 1 + 6


# index + 1 of DataFrame.sort_values(by=["ImageID"]), pandas 2.2.3 and 3.1.1
PANDAS = (
    *(1, 36, 6, 31, 26, 11, 21, 16, 37, 35, 32, 30, 27, 25, 22, 17, 20, 40, 2, 12, 10, 5, 7, 15),
    *(38, 3, 4, 34, 33, 18, 28, 9, 24, 23, 13, 14, 39, 19, 8, 29),
)


def test_boxes_of_an_image_are_in_the_order_of_pandas(tmp_path):
    images = [f"{number * number * 7 % 5:016x}" for number in range(40)]
    lines = [f"{image},x,{LABELS['Tea']},1,0,1,0,1,0,0,0,0,0" for image in images]
    (tmp_path / "boxes.csv").write_text("\n".join([HEAD, *lines]))
    (tmp_path / "classes.csv").write_text(descriptions())
    found = read_boxes(tmp_path / "boxes.csv", tmp_path / "classes.csv", CLASSES)
    made = coco_annotations(found, CLASSES, dict.fromkeys(images, (1, 1)))["annotations"]
    assert [one["id"] for one in made] == [*PANDAS]
    assert [one["image_id"] for one in made] == sorted(one["image_id"] for one in made)


def test_nothing_made_lies_in_the_checkout():
    """The map of the validation split is made in the build folder."""
    val = known_dataset("openimages", "val", Path("build"))
    assert val.map_file == Path("build/data/openimages/val_map.txt")
    assert val.image_size == 800
    command = ["git", "check-ignore", "-q", val.map_file]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode in (0, 128)  # 128: no git

"""The shipped demo data set, its generator and the training objective."""

import itertools
import json
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo import make_dataset
from demo.categories import CATEGORIES
from demo.evaluate import coco_map
from demo.glyphs import ATLAS, FONT, Atlas, DemoError, render
from demo.make_dataset import IMAGES, MIN_PER_CATEGORY, make_split
from demo.objective import IGNORED, encode
from demo.scene_pool import augment, to_sample
from demo.scenes import scenes, stream
from demo.ssd_objective import ENCODING, match, multibox_loss
from export.ssd_resnet34.config import SSDConfig
from export.ssd_resnet34.default_boxes import default_boxes
from export.ssd_resnet34.postprocess import SSDPostProcess
from tests.support import ROOT

DATA = ROOT / "demo" / "data"
ANNOTATIONS = DATA / "annotations" / "instances_val.json"

# The categories of COCO 2017: ids are 1..90 without the numbers below.
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush
"""


@pytest.fixture(scope="module")
def truth():
    return json.loads(ANNOTATIONS.read_text())


@pytest.fixture(scope="module")
def atlas():
    return Atlas.load()


def boxes_of(truth, crowd):
    return [a for a in truth["annotations"] if a["iscrowd"] == crowd]


def names_of(split):
    return (ROOT / "data_maps" / "demo" / f"{split}_map.txt").read_text().splitlines()


# ---- the shipped files


def test_categories_are_coco_s(truth):
    ids = [i for i in range(1, 91) if i not in COCO_GAPS]
    names = [" ".join(name.split()) for name in COCO_NAMES.split(",")]
    found = [(c["id"], c["name"]) for c in truth["categories"]]
    assert found == list(zip(ids, names, strict=True))
    assert [(c.id, c.name) for c in CATEGORIES] == found
    assert len({c["supercategory"] for c in truth["categories"]}) == 12


def test_every_category_occurs(truth):
    seen = Counter(a["category_id"] for a in boxes_of(truth, crowd=0))
    assert {c.id for c in CATEGORIES if seen[c.id] < MIN_PER_CATEGORY} == set()


def test_pictures_have_the_recorded_size(truth):
    sizes = set()
    for image in truth["images"]:
        pixels = cv2.imread(str(DATA / "val" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        sizes.add(pixels.shape)
    assert len(truth["images"]) == IMAGES["val"]
    assert len(sizes) > 50


def test_annotations_are_sound(truth):
    sizes = {i["id"]: (i["width"], i["height"]) for i in truth["images"]}
    assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        width, height = sizes[annotation["image_id"]]
        assert x >= 0
        assert y >= 0
        assert w >= 1
        assert h >= 1
        assert x + w <= width
        assert y + h <= height
        assert 0 < annotation["area"] <= w * h
    empty = sizes.keys() - {a["image_id"] for a in truth["annotations"]}
    assert len(empty) >= 3
    assert len(boxes_of(truth, crowd=1)) >= 3


def test_segmentations_agree_with_boxes(truth):
    from pycocotools import mask as masks

    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    for annotation in truth["annotations"]:
        segmentation, size = annotation["segmentation"], sizes[annotation["image_id"]]
        rle = masks.frPyObjects(segmentation, *size)
        if annotation["iscrowd"]:
            assert segmentation["size"] == list(size)
            assert masks.area(rle) == annotation["area"]
            assert masks.toBbox(rle).tolist() == annotation["bbox"]
        else:  # corners lie on pixel centres; the outline is simplified by up to one pixel
            corners = np.concatenate(segmentation).reshape(-1, 2)
            left, top, width, height = annotation["bbox"]
            first, last = (left, top), (left + width - 1, top + height - 1)
            assert np.abs(corners.min(axis=0) - first).max() <= 1
            assert np.abs(corners.max(axis=0) - last).max() <= 1
            assert masks.area(masks.merge(rle)) > 0.5 * annotation["area"]


def test_map_files_name_the_pictures(truth):
    assert names_of("val") == [i["file_name"] for i in truth["images"]]
    for split, count in IMAGES.items():
        names = names_of(split)
        assert len(names) == count
        assert set(names) == {p.name for p in (DATA / split).iterdir()}
    assert not set(names_of("val")) & set(names_of("cal"))


def test_no_picture_is_in_two_splits():
    contents = {s: {p.read_bytes() for p in (DATA / s).iterdir()} for s in IMAGES}
    assert not contents["val"] & contents["cal"]
    assert [len(contents[s]) for s in IMAGES] == list(IMAGES.values())


@pytest.mark.slow
def test_perfect_detections_score_one(truth):
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in boxes_of(truth, crowd=0)
    ]
    assert coco_map(perfect, ANNOTATIONS)["mAP"] == pytest.approx(1.0)
    # A detection inside a crowd is neither right nor wrong.
    inside = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.99}
        for a in boxes_of(truth, crowd=1)
    ]
    assert coco_map(perfect + inside, ANNOTATIONS)["mAP"] == pytest.approx(1.0)


def test_wrong_labels_score_next_to_nothing(truth):
    ids = [c.id for c in CATEGORIES]
    wrong = [
        {
            "image_id": a["image_id"],
            "category_id": ids[(ids.index(a["category_id"]) + 1) % 80],
            "bbox": a["bbox"],
            "score": 0.9,
        }
        for a in boxes_of(truth, crowd=0)
    ]
    assert coco_map(wrong, ANNOTATIONS)["mAP"] < 0.05
    assert coco_map([], ANNOTATIONS)["mAP"] == 0


# ---- the generator


def test_regeneration_gives_the_shipped_annotations(truth, atlas):
    files, again = make_split("val", atlas, 3)
    ids = {i["id"] for i in again["images"]}
    assert again["images"] == truth["images"][:3]
    assert again["annotations"] == [a for a in truth["annotations"] if a["image_id"] in ids]
    for name, content in files.items():
        made = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        shipped = cv2.imread(str(DATA / "val" / name))
        assert np.abs(made.astype(int) - shipped).mean() < 2


def test_the_yardstick_is_written_whole_and_reads_as_coco(tmp_path, monkeypatch):
    from pycocotools.coco import COCO

    monkeypatch.setattr(make_dataset, "YARDSTICK", {"choose": 3, "judge": 2})
    make_dataset.make_dataset(ATLAS, DATA, ROOT / "data_maps" / "demo", tmp_path)
    pictures = {}
    for split, count in make_dataset.YARDSTICK.items():
        truth = COCO(str(tmp_path / "annotations" / f"instances_{split}.json"))
        names = (tmp_path / f"{split}_map.txt").read_text().splitlines()
        assert [truth.imgs[i]["file_name"] for i in sorted(truth.imgs)] == names
        pictures |= {(tmp_path / split / name).read_bytes(): split for name in names}
        assert list(pictures.values()).count(split) == len(names) == count


@pytest.mark.slow
def test_splits_draw_different_scenes(atlas):
    keys = (("val",), ("cal",), ("choose",), ("judge",), ("train", 0, 0))
    first = [next(scenes(stream(*key), atlas)) for key in keys]
    again = next(scenes(stream("train", 0, 0), atlas))
    assert len({s.image.tobytes() for s in first}) == len(keys)
    assert np.array_equal(first[-1].image, again.image)


@pytest.mark.slow
def test_boxes_are_tight_around_what_shows(atlas):
    for scene in itertools.islice(scenes(stream("train", 1), atlas), 20):
        assert scene.image.dtype == np.uint8
        assert scene.owner.max() == len(scene.boxes)
        for index, (x, y, w, h) in enumerate(scene.boxes):
            rows, columns = np.nonzero(scene.owner == index + 1)
            assert (columns.min(), rows.min()) == (x, y)
            assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (w, h)
            assert len(rows) == scene.areas[index]


def test_atlas_holds_every_category_once(atlas):
    assert set(atlas.classes.tolist()) == set(range(80))
    assert len({p.tobytes() for p in atlas.pictures}) == len(atlas.pictures)
    for picture in atlas.pictures:
        assert picture.shape[2] == 4
        assert max(picture.shape[:2]) <= 140
        edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
        assert all(edge[..., 3].max() >= 16 for edge in edges), "not trimmed"


@pytest.mark.skipif(not FONT.is_file(), reason=f"{FONT} is not installed")
def test_atlas_follows_from_the_font(atlas):
    made = render()
    assert made.classes.tolist() == atlas.classes.tolist()
    for picture, shipped in zip(made.pictures, atlas.pictures, strict=True):
        assert picture.shape == shipped.shape
        assert np.abs(picture.astype(int) - shipped).mean() < 2


def test_missing_atlas_and_font_are_named(tmp_path):
    with pytest.raises(DemoError, match=r"nothing\.npz.*demo\.glyphs"):
        Atlas.load(tmp_path / "nothing.npz")
    with pytest.raises(DemoError, match=r"nothing\.ttf.*--font"):
        render(tmp_path / "nothing.ttf")


def test_atlas_survives_saving(tmp_path):
    atlas = Atlas.load(ATLAS)
    atlas.save(tmp_path / "a.npz")
    again = Atlas.load(tmp_path / "a.npz")
    pairs = zip(again.pictures, atlas.pictures, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


# ---- training samples and objective


def test_sample_and_augmentation_keep_boxes_on_the_objects():
    """A bright square on black stays under its box through resizing, cropping and flipping."""
    torch.manual_seed(0)
    images = torch.zeros(64, 100, 100, 3, dtype=torch.uint8)
    images[:, 30:60, 20:45] = 255
    boxes = torch.zeros(64, 16, 4)
    boxes[:, 0] = torch.tensor([0.20, 0.30, 0.45, 0.60])
    classes = torch.zeros(64, 16, dtype=torch.int64)
    classes[:, 0] = 7
    pixels, moved, kinds = augment(images, boxes, classes)
    seen = 0
    for picture, box, kind in zip(pixels, moved[:, 0], kinds[:, 0], strict=True):
        rows, columns = np.nonzero(picture.mean(0).numpy() > 128)
        if kind == 7:
            seen += 1
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(edges) - 100 * box.numpy()).max() <= 1.5
        elif kind == 0:
            assert len(rows) == 0
    assert seen > 40
    assert set(kinds[:, 1:].flatten().tolist()) == {0}


@pytest.mark.slow
def test_sample_scales_boxes_with_the_picture(atlas):
    for scene in itertools.islice(scenes(stream("train", 2), atlas), 5):
        image, boxes, classes = to_sample(scene, 200)
        height, width = scene.image.shape[:2]
        assert image.shape == (200, 200, 3)
        for row, (x, y, w, h) in enumerate(scene.boxes):
            expected = [x / width, y / height, (x + w) / width, (y + h) / height]
            assert boxes[row] == pytest.approx(expected, abs=1e-5)
            expected_class = IGNORED if scene.crowd[row] else scene.classes[row] + 1
            assert classes[row] == expected_class
        assert not classes[len(scene.boxes) :].any()


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    inter = w * h
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_matching_against_brute_force(seed, count):
    rng = np.random.default_rng(seed)
    priors = np.concatenate([rng.random((40, 2)), rng.uniform(0.1, 0.5, (40, 2))], 1)
    corners = np.concatenate(
        [priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1
    )
    start = rng.random((5, 2)) * 0.6
    boxes = np.concatenate([start, start + rng.uniform(0.1, 0.4, (5, 2))], 1)
    classes = np.zeros(5, np.int64)
    classes[:count] = rng.integers(1, 81, count)
    classes[4] = IGNORED
    table = np.array([[iou(b, c) for c in corners] for b in boxes])
    best = {m: int(table[m].argmax()) for m in range(count)}

    targets = match(
        torch.tensor(boxes[None], dtype=torch.float32),
        torch.tensor(classes[None]),
        torch.tensor(priors, dtype=torch.float32),
    )
    for p in range(40):
        owners = [m for m in range(count) if best[m] == p] or [
            m for m in range(count) if table[m, p] >= 0.5
        ]
        if owners:
            owner = max(owners, key=lambda m: table[m, p])
            expected = classes[owner]
            w, h = boxes[owner, 2:] - boxes[owner, :2]
            cx, cy = (boxes[owner, 2:] + boxes[owner, :2]) / 2
            px, py, pw, ph = priors[p]
            deltas = [
                (cx - px) / pw * 10,
                (cy - py) / ph * 10,
                np.log(w / pw) * 5,
                np.log(h / ph) * 5,
            ]
            assert targets.deltas[0, :, p].numpy() == pytest.approx(deltas, abs=1e-3)
        else:
            lap = np.minimum(boxes[4, 2:], corners[p, 2:]) - np.maximum(
                boxes[4, :2], corners[p, :2]
            )
            cover = np.prod(np.clip(lap, 0, None)) / np.prod(priors[p, 2:])
            expected = IGNORED if cover > 0.5 else 0
        assert targets.classes[0, p] == expected


def test_encoding_is_the_inverse_of_the_network_s_decoding():
    config = SSDConfig(image_size=400, num_classes=81, width=2)
    priors = torch.from_numpy(default_boxes(config))
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(2, len(priors), 2, generator=generator) * 0.7
    size = torch.rand(2, len(priors), 2, generator=generator) * 0.3 + 0.02
    boxes = torch.cat([start, start + size], dim=2)
    decoded = SSDPostProcess(config).decode(encode(boxes, priors, ENCODING).transpose(1, 2))
    assert torch.allclose(decoded, boxes, atol=1e-5)


def test_loss_counts_objects_and_the_hardest_background():
    """Four default boxes: one object, one ignored, two background; 3:1 mining takes both."""
    priors = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2], [0.2, 0.8, 0.2, 0.2],
                           [0.8, 0.2, 0.2, 0.2]])  # fmt: skip
    boxes = torch.tensor([[[0.1, 0.1, 0.3, 0.3], [0.7, 0.7, 0.9, 0.9]]])
    targets = match(boxes, torch.tensor([[3, IGNORED]]), priors)
    conf = torch.zeros(1, 5, 4)
    conf[0, 3, 0] = 100.0  # sure of the object
    conf[0, 2, 1] = 100.0  # wrong inside the crowd: free
    conf[0, 0, 2] = 100.0  # sure of background
    loc = torch.zeros(1, 4, 4)
    loc_loss, conf_loss = multibox_loss(loc, conf, targets)
    assert loc_loss == pytest.approx(0, abs=1e-6)
    assert conf_loss == pytest.approx(np.log(5))  # prior 3 is undecided between five classes
    loc[0, :, 1:] = 9  # boxes of background do not count
    assert multibox_loss(loc, conf, targets)[0] == pytest.approx(0, abs=1e-6)
    loc[0, 0, 0] = 2  # smooth L1 beyond beta
    assert multibox_loss(loc, conf, targets)[0] == pytest.approx(2 - 0.5 / 9)


def test_mining_limits_the_background():
    """With one object, only the three hardest of many background boxes count."""
    priors = torch.rand(50, 4, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.8
    priors[0] = torch.tensor([0.2, 0.2, 0.2, 0.2])
    boxes = torch.tensor([[[0.1, 0.1, 0.3, 0.3]]])
    conf = torch.zeros(1, 2, 50)
    conf[0, 1, 0] = 100.0
    conf[0, 1, 10:20] = torch.arange(10.0) + 20  # loss = about the logit
    _, conf_loss = multibox_loss(
        torch.zeros(1, 4, 50), conf, match(boxes, torch.tensor([[1]]), priors)
    )
    assert conf_loss == pytest.approx(29 + 28 + 27, rel=1e-4)

"""Class names: from checkpoint, file or COCO into the metadata, and through the route."""

from __future__ import annotations

import json

import onnx
import pytest
import torch

from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.quantization.quantize import quantize
from export.checkpoint import read_checkpoint
from export.errors import ExportError
from export.names import choose_names
from graph_surgery.errors import SurgeryError
from graph_surgery.files import load
from graph_surgery.names import add_names
from graph_surgery.replace import insert_nms
from harness.predict import class_names
from tests.support import ROOT, command
from tests.support.calibrated import write_images
from tests.support.graphs import CLASSES, UNCAPPED, detector, nms_node

OWN = [f"thing {number}" for number in range(80)]


def names_of(model):
    return json.loads({e.key: e.value for e in model.metadata_props}["class_names"])


def coco():
    content = json.loads((ROOT / "demo/data/annotations/instances_val.json").read_text())
    return [entry["name"] for entry in content["categories"]]


def test_export_writes_the_names_of_coco_for_81_classes(exported) -> None:
    assert names_of(onnx.load(exported)) == coco()


def test_names_go_through_surgery_and_quantisation(exported, small_images, tmp_path) -> None:
    path, file = tmp_path / "model.nms.onnx", tmp_path / "names.txt"
    file.write_text("background\n" + "\n".join(OWN) + "\n\n")
    done = command("graph_surgery", "nms", exported, path, "--names", file)
    assert f"class names: 80, {file}" in done.stdout
    assert names_of(onnx.load(path)) == OWN
    images = write_images(tmp_path, small_images[:1])
    int8 = quantize(
        load_detector(path).model, calibrate(load_detector(path), images), float_type="fp16"
    )
    assert names_of(int8) == OWN


def test_surgery_keeps_adds_and_refuses(exported, tmp_path) -> None:
    model = insert_nms(load(exported)).model
    assert add_names(model, None) == "class names: 80, the model's own"
    (entry,) = (entry for entry in model.metadata_props if entry.key == "class_names")
    entry.value = json.dumps(OWN[:79])
    with pytest.raises(SurgeryError, match=r"79 class names .*detects 80 classes"):
        add_names(model, None)
    for broken in ("{}", "[1]", "["):
        entry.value = broken
        with pytest.raises(SurgeryError, match="class_names is no JSON list of names"):
            add_names(model, None)
    model.metadata_props.remove(entry)
    assert "COCO's, for 80 classes" in add_names(model, None)
    assert names_of(model) == coco()
    with pytest.raises(SurgeryError, match="cannot read the names"):
        add_names(model, tmp_path / "none.txt")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(SurgeryError, match="no UTF-8 text"):
        add_names(model, tmp_path / "names.txt")


@pytest.mark.parametrize(("background", "count"), [(-1, CLASSES), (CLASSES - 1, CLASSES - 1)])
def test_labels_from_0_have_names_too(background, count, tmp_path) -> None:
    model = insert_nms(detector(UNCAPPED)).model
    (attribute,) = (a for a in nms_node(model).attribute if a.name == "backgroundLabelId")
    attribute.i = background
    file = tmp_path / "names.txt"
    file.write_text("\n".join(OWN[:count]))
    assert add_names(model, file) == f"class names: {count}, {file}"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert class_names(load_detector(path), None) == dict(enumerate(OWN[:count]))


@pytest.mark.parametrize("names", [OWN, tuple(OWN), dict(enumerate(OWN))])
@pytest.mark.parametrize("key", ["class_names", "names", "classes"])
def test_a_checkpoint_brings_its_own(names, key, small_model, tmp_path) -> None:
    path = tmp_path / "own.pth"
    torch.save({"model": small_model.state_dict(), key: names}, path)
    assert read_checkpoint(path).names == tuple(OWN)
    assert choose_names(None, OWN, 81, background=True) == (tuple(OWN), "the checkpoint's own")


def test_what_is_no_list_of_names_is_none(small_model, tmp_path) -> None:
    path = tmp_path / "own.pth"
    for other in (80, "names.txt", [1, 2], {"a": "b"}, {0: "a", 2: "b"}):
        torch.save({"state_dict": small_model.state_dict(), "classes": other}, path)
        assert read_checkpoint(path).names == ()


def test_safetensors_bring_their_own(small_model, tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "own.safetensors"
    save_file(small_model.state_dict(), path, {"class_names": json.dumps(OWN)})
    assert read_checkpoint(path).names == tuple(OWN)


def test_a_users_file_comes_first_and_must_fit(tmp_path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\n", encoding="utf-8-sig")
    assert choose_names(file, OWN, 3, background=True) == (("cat", "dog"), str(file))
    file.write_text("__background__\ncat\ndog\n")
    assert choose_names(file, OWN, 3, background=True)[0] == ("cat", "dog")
    for classes in (2, 5, 81):
        with pytest.raises(ExportError, match=f"3 class names .* {classes} classes"):
            choose_names(file, OWN, classes, background=True)
    with pytest.raises(ExportError, match=r"80 class names .*--names FILE"):
        choose_names(None, OWN, 91, background=True)
    assert choose_names(None, (), 91, background=True)[0] == ()

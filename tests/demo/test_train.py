"""That the trainer trains every detector, and that the route takes what it writes."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from demo.evaluate import coco_map
from demo.glyphs import Atlas, DemoError
from demo.recipes import RECIPES
from demo.scene_pool import to_sample
from demo.scenes import scenes, stream
from demo.train import Trainer, app
from export.architectures import ARCHITECTURES
from export.checkpoint import infer_config, read_checkpoint
from export.cli import app as export_app
from graph_surgery.cli import app as surgery_app

SIDES = {"ssd-resnet34": 400, "retinanet": 128}
"""Of small images; the first can have none much smaller."""
WIDTH = 4


@pytest.mark.slow
def test_every_detector_has_a_recipe():
    assert RECIPES.keys() == ARCHITECTURES.keys()
    for name, recipe in RECIPES.items():
        assert recipe.architecture is ARCHITECTURES[name]
        # What it makes of the MLPerf model's width has the MLPerf model's body.
        full, made = recipe.architecture.config(), recipe.config(400, 64)
        assert made.image_shape == (400, 400)
        assert made.num_classes == 80 + recipe.architecture.background
        with torch.device("meta"):
            ours, mlperf = (recipe.architecture.network(c).state_dict() for c in (made, full))
        differ = {n for n in mlperf if ours[n].shape != mlperf[n].shape}
        assert ours.keys() == mlperf.keys()
        assert all("cls_logits" in name for name in differ)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_steps_on_a_handful_of_scenes_lower_the_loss(name):
    made = itertools.islice(scenes(stream("train", 3), Atlas.load()), 2)
    parts = zip(*(to_sample(scene, SIDES[name]) for scene in made), strict=True)
    images, boxes, classes = (torch.stack([torch.from_numpy(x) for x in part]) for part in parts)
    torch.manual_seed(0)
    recipe = RECIPES[name]
    trainer = Trainer(recipe, recipe.config(SIDES[name], WIDTH), torch.device("cpu"))
    planes = images.permute(0, 3, 1, 2).float()
    losses = torch.stack([trainer.step(planes, boxes, classes, 2e-3) for _ in range(10)])
    first, last = losses[0], losses[-3:].mean(0)
    assert (last < 0.8 * first).all(), losses


@pytest.mark.slow
def test_the_route_takes_what_the_command_writes(tmp_path):
    name, other = "retinanet", "ssd-resnet34"  # the latter's checkpoint is shipped
    out, log = tmp_path / "demo.safetensors", tmp_path / "log.jsonl"
    options = {"model": name, "out": out, "log": log, "width": WIDTH, "image-size": SIDES[name],
               "minutes": 0.02, "batch": 2, "workers": 0, "pool": 16}  # fmt: skip
    arguments = [f"--{option}={value}" for option, value in options.items()]
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    summary = json.loads(out.with_suffix(".json").read_text())
    assert summary["model"] == name
    assert summary["lr"] == RECIPES[name].lr
    assert summary["steps"] == json.loads(log.read_text().splitlines()[-1])["step"]
    assert summary["metrics"].keys() == coco_map([], out).keys()
    weights = read_checkpoint(out)
    assert weights.architecture is RECIPES[name].architecture
    assert infer_config(weights) == RECIPES[name].config(SIDES[name], WIDTH)

    model, surgered = tmp_path / "demo.onnx", tmp_path / "demo.nms.onnx"
    steps = (
        (export_app, ["--weights", str(out), "-o", str(model)]),
        (surgery_app, ["nms", str(model), str(surgered)]),
    )
    for step, argv in steps:
        done = CliRunner().invoke(step, argv, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert surgered.is_file()

    # Another detector's run is not taken up.
    again = [f"--model={other}", f"--resume={out.with_suffix('.resume.pt')}"]
    refused = CliRunner().invoke(app, [*arguments[1:], "--image-size=400", *again])
    assert isinstance(refused.exception, DemoError)
    assert "is of" in str(refused.exception)

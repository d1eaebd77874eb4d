"""Whose weights, data set and image size a route has."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import onnx
import pytest

import harness.make.route
from graph_surgery.replace import insert_nms
from harness.benchmarks import BENCHMARKS
from harness.errors import HarnessError
from harness.make.route import build_onnx, route_of
from tests.support.graphs import UNCAPPED, detector


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_weights_and_data_set_that_are_given_are_used(benchmark):
    mine = route_of(benchmark, Path("my.pth"), Path("build"), print, dataset="traffic")
    assert (mine.weights, mine.dataset) == (Path("my.pth"), "traffic")
    own = route_of(benchmark, None, Path("build"), print)
    assert own.dataset == BENCHMARKS[benchmark].dataset
    assert own.weights != mine.weights


class StoppedError(Exception):
    """After the export."""


@pytest.mark.parametrize(("size", "given"), [(None, None), (640, "640")])
def test_image_size_and_entry_reach_the_export(tmp_path, monkeypatch, size, given):
    weights = tmp_path / "my.pth"
    weights.touch()
    commands = []

    def command(*arguments):
        commands.append(arguments)
        raise StoppedError

    monkeypatch.setattr(harness.make.route, "_command", command)
    entry = "ema" if size else None
    options = {"image_size": size, "entry": entry}
    route = route_of("ssd-resnet34-demo", weights, tmp_path, lambda _: None, **options)
    with pytest.raises(StoppedError):
        build_onnx(route)
    ((room, *arguments),) = commands
    assert room == "export"
    options = dict(pairwise(arguments))
    assert options["--weights"] == weights
    assert options.get("--image-size") == given
    assert options.get("--entry") == entry


@pytest.mark.parametrize("given", [{"image_size": 640}, {"entry": "ema"}])
def test_an_onnx_file_has_its_image_size_and_no_entries(tmp_path, given):
    (tmp_path / "my.onnx").touch()
    route = route_of("ssd-resnet34", tmp_path / "my.onnx", tmp_path, print, **given)
    option = f"--{next(iter(given)).replace('_', '-')}"
    with pytest.raises(HarnessError, match=f"leave out {option}"):
        build_onnx(route)


def test_weights_of_another_detector_are_refused(tmp_path):
    """Their runs would be called by the wrong name."""
    model = insert_nms(detector(UNCAPPED)).model
    onnx.helper.set_model_props(model, {"detector": "retinanet"})
    onnx.save(model, tmp_path / "my.onnx")
    route = route_of("ssd-resnet34", tmp_path / "my.onnx", tmp_path, print)
    with pytest.raises(
        HarnessError, match=r"of retinanet, .* of ssd-resnet34: --benchmarks=retina"
    ):
        build_onnx(route)

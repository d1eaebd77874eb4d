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


@pytest.mark.parametrize(
    ("value", "said"),
    [("1200x800", True), (None, False), ("1200", False), ("1x1\x1b[2J", False), ("1x1\n", False)],
)
@pytest.mark.parametrize("suffix", [".pth", ".onnx"])
def test_a_guessed_image_size_is_said_each_time(tmp_path, monkeypatch, value, said, suffix):
    """Also where the export is used again, and of what has been exported elsewhere."""

    def export(path):
        model = detector(UNCAPPED)
        onnx.helper.set_model_props(model, {"image_size_guess": value} if value else {})
        onnx.save(model, path)

    def command(room, *arguments):
        if room == "export":
            export(arguments[arguments.index("-o") + 1])
        else:
            _, given, output, _ = arguments
            onnx.save(insert_nms(onnx.load(given)).model, output)

    monkeypatch.setattr(harness.make.route, "_command", command)
    weights = tmp_path / f"my{suffix}"
    export(weights)
    for again in (False, True):
        lines: list[str] = []
        build_onnx(route_of("ssd-resnet34-demo", weights, tmp_path / "build", lines.append))
        assert all(("reused" in line) == again for line in lines if "image size" not in line)
        found = [line for line in lines if line.startswith("image size: ")]
        assert len(found) == said
        for line in found:
            assert line.startswith(f"image size: {value} is a guess, ")
            assert line.endswith("--image-size SIDE, or IMAGE_SIZE=SIDE")

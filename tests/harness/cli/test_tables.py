"""Tables on a terminal of 80 columns: names are folded, never cut, and no line is longer."""

from __future__ import annotations

import re

import cv2
import pytest
from rich.console import Console
from typer.testing import CliRunner

from engine.comparison.compare import Comparison, DetectionDifference, HeadDifference
from engine.quantization.sensitivity import LayerSensitivity, Noise, Sensitivity
from engine.report import comparison_tables, sensitivity_table
from graph_surgery.inspect import tables
from graph_surgery.survey import Survey
from harness.cli.doctor import GPU_PARTS
from harness.cli.main import app
from harness.doctor import doctor
from harness.doctor.packages import declared_packages
from harness.doctor.resources import find_resources
from tests.support.grey import grey_detector
from tests.support.photos import photo

LONG = "backbone/" + "a_name_without_a_place_to_break" * 4
WIDTH = 80


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def printed(what):
    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def check(text, *names):
    """Without frames and folds, all that was to be shown is there."""
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in text
    cells = [[cell.strip() for cell in re.split("[│┃]", line)] for line in lines]
    columns = ["".join(row[i] for row in cells if len(row) > i) for i in range(9)]
    for name in names:
        assert any(name.replace(" ", "") in one.replace(" ", "") for one in columns), name


def test_sensitivity():
    noise = Noise(-123.45, 123.45)
    found = Sensitivity(8, noise, (LayerSensitivity(LONG, noise, noise, -123.45),))
    check(printed(sensitivity_table(found)), LONG, "-123.5", "only it float: loc")


def test_comparison():
    one = HeadDifference(LONG, -123.45, -123.45, 0, 1.23e-10, 1.23e-10, 1.23e-10)
    pairs = DetectionDifference(123456, 123456, 123456, 123456, 123456, 0.9876, 0.000123)
    found = Comparison(8, (one,), pairs, None, (), layers=(one,), alone=(one,))
    check(printed(comparison_tables(found)), LONG, "1.23e-10", "123456", "0.000123")


def test_inspect():
    check(printed(tables(Survey({LONG: LONG}))), LONG)


@pytest.mark.parametrize("name", ["a_picture_with_a_name" * 9, "several words " * 12])
def test_predict(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    grey_detector(tmp_path / "grey.onnx")
    cv2.imwrite(f"{name}.png", photo(40, 50))
    (tmp_path / "names.txt").write_text("".join(f"{LONG}{n}\n" for n in range(26)))
    command = ["predict", "grey.onnx", f"{name}.png", "--names", "names.txt", "-o", "out"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    check(done.output, f"{name}.png", f"1 {LONG}")


def test_doctor_says_what_to_do_about_each_part_that_does_not_work(tmp_path, monkeypatch):
    abilities = [
        doctor.Ability("export-onnx", "works", LONG),
        doctor.Ability("engine onnxruntime, cuda", "no", LONG, LONG),
        doctor.Ability("engine cudnn", "no", LONG),
        doctor.Ability("build-plugin", "partly", "no compiler: apt-get install g++"),
    ]
    monkeypatch.setattr(
        doctor,
        "examine",
        lambda _: doctor.Report(
            {"executable": LONG},
            declared_packages(),
            doctor.Gpus(None, None, (), LONG),
            tuple(abilities),
            find_resources(tmp_path),
            "one thing",
        ),
    )
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.exception
    check(
        done.output,
        LONG,
        f"to do: {LONG}",
        "to do: nothing on this machine; it needs an NVIDIA GPU",
        "to do: what is said above",
    )
    assert done.output.count("to do: ") == 3
    assert done.output.endswith("Next: one thing\n")
    assert set(GPU_PARTS) <= set(doctor._PROBES.values())

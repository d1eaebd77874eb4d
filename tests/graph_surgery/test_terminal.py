"""What files say reaches a terminal as text alone."""

from __future__ import annotations

from io import StringIO

import cv2
import numpy as np
import onnx
import pytest
from rich.markup import escape
from rich.table import Table
from typer.testing import CliRunner

from engine.cli import app
from graph_surgery.terminal import new_console
from tests.support.grey import grey_detector, harness

HOSTILE = "a\x1b]0;title\x07b\x1b[31mc\x9b1mé"
"""Sets a title, rings, and makes red what follows, in two codings."""


def test_a_console_obeys_itself_alone():
    shown = StringIO()
    console = new_console(file=shown, force_terminal=True, width=60, color_system="standard")
    table = Table("[bold]head[/]", escape(HOSTILE))
    table.add_row("[red]ours[/]", escape(HOSTILE))
    console.print(table)
    console.print(HOSTILE, markup=False, highlight=False)
    text = shown.getvalue()
    assert "\x1b[31mours" in text
    assert "\x1b[31mc" not in text and "\x1b]" not in text
    assert "\x07" not in text and "\x9b" not in text
    assert text.count(r"a\x1b]0;titleb\x1b[31mc\x9b1mé") == 3


def test_engine_inspect(tmp_path):
    grey_detector(tmp_path / "grey.onnx")
    model = onnx.load(tmp_path / "grey.onnx")
    model.metadata_props.add(key=HOSTILE, value=HOSTILE)
    onnx.save(model, tmp_path / "grey.onnx")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "grey.onnx")])
    assert shown.exit_code == 0
    assert "x1b" in shown.output
    assert all(one.isprintable() or one == "\n" for one in shown.output)


@pytest.mark.slow
def test_predict(tmp_path):
    grey_detector(tmp_path / "grey.onnx")
    name = HOSTILE.replace("/", "")
    cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((60, 80, 3), 10, np.uint8))
    (tmp_path / f"{name}.jpg").write_text("no picture")
    done = harness(tmp_path, "predict", "grey.onnx", ".", "-o", "out")
    assert done.returncode == 1
    assert "x1b" in done.stdout and "x1b" in done.stderr
    assert all(one.isprintable() or one == "\n" for one in done.stdout + done.stderr)

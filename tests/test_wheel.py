"""The wheel, built and used outside the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.support import ROOT, attempt
from tests.support.grey import grey_dataset, grey_detector

pytestmark = pytest.mark.slow  # a build, and commands in processes of their own

PARTS = ("engine", "export", "graph_surgery", "harness", "plugin_cuda", "configs", "data_maps")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content, as `pip install --no-deps` leaves it."""
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-q", "-w", place, source], check=True, timeout=300)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(place / "installed")
    return place / "installed"


def test_a_data_set_and_a_run(installed, tmp_path):
    def command(*words):
        done = attempt("-m", *words, cwd=tmp_path, PYTHONPATH=str(installed), BUILD_DIR="build")
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = command("harness", "--version")
    assert said.endswith(f" {version(installed)}\n")
    found = attempt(
        *("-c", "import harness; print(harness.__file__)"),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert found.stdout.startswith(str(installed))
    assert "--resume" in command("harness", "run", "--help")
    grey_dataset(tmp_path / "photos", tmp_path / "instances.json")
    grey_detector(tmp_path / "grey.onnx")
    command(
        *("harness", "dataset", "add", "greys", "--images", "photos"),
        *("--annotations", "instances.json"),
    )
    command("harness", "preprocess", "grey.onnx", "--dataset", "greys", "--val_only")
    command("harness", "run", "grey.onnx", "--dataset", "greys", "--test_mode", "AccuracyOnly")
    (result,) = tmp_path.glob("build/logs/*/*/*/Offline/AccuracyOnly/result.json")
    assert json.loads(result.read_text())["value"] == pytest.approx(1.0)
    assert "grey 90" in next(tmp_path.glob("build/logs/*/report.html")).read_text()
    command("graph_surgery", "--version")
    # what is shipped is found without a checkout: COCO's maps, and the machines' configurations
    done = attempt(
        *("-m", "harness", "make", "run", "--system", "none-such"),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
        BUILD_DIR="build",
    )
    assert done.returncode == 2 and "h200-sxm-141gb" in done.stderr


def version(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("Version: "))

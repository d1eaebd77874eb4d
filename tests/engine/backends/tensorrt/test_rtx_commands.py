"""`engine build` and Polygraphy build with TensorRT-RTX and the plugin."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.backends.tensorrt.module import RTX
from engine.manifest import load_manifest
from tests.support import attempt
from tests.support.rtx_plans import NEEDS_RTX, TARGETS, check_plan, edited

pytestmark = NEEDS_RTX


def engine_build(model, library, output, *options):
    """The command that users call."""
    words = ("-m", "engine", "build", model, "--backend", RTX, "-o", output)
    return attempt(*words, "--plugin", library, *options)


def test_command_builds_with_the_library(int8, trt_plugin_library, kernels, tmp_path):
    """Values that no default has arrive in the plan, too."""
    others = {"topK": 123, "keepTopK": 77, "confidenceThreshold": 0.0625, "nmsThreshold": 0.25}
    model = edited(int8, tmp_path / "other.onnx", **others)
    engine = tmp_path / "other.engine"
    targets = [part for target in TARGETS for part in ("--compute-capability", target)]
    done = engine_build(model, trt_plugin_library, engine, "--max-batch", "16", *targets)
    assert done.returncode == 0, done.stderr
    check_plan(engine.read_bytes(), model, 16, kernels)
    assert (
        load_manifest(engine).plugins[0].sha256
        == sha256(trt_plugin_library.read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"topK": 2000}, "attribute topK = 2000 is not in 1..1024"),
        ({"confSigmoid": 1}, "confSigmoid = 1 and confSoftmax = 1: exactly one must be 1"),
        ({"nmsThreshold": 1}, "attribute nmsThreshold has the field type 5, expected 1 (FLOAT32)"),
        ({"inputOrder": [0, 6]}, "attribute inputOrder has 2 values, expected 3"),
        (
            {"plugin_version": "2", "levelTopK": 30, "clipBeforeNms": 0, "bboxXformClip": 0.0},
            "topK = 200 is not supported with levelTopK = 30, only numLayers times it: 180",
        ),
        ({"plugin_version": "2"}, "attribute levelTopK is missing"),
        ({"numClasses": 5}, "conf_0 has 324 channels, expected 20: 4 anchors, as loc_0 has"),
    ],
)
def test_command_shows_what_the_plugin_refuses(
    int8, trt_plugin_library, tmp_path, attributes, message
):
    model = edited(int8, tmp_path / "bad.onnx", **attributes)
    done = engine_build(model, trt_plugin_library, tmp_path / "bad.engine")
    assert done.returncode == 2
    assert "NMS_OPT_TRT: " in done.stderr
    assert message in done.stderr
    assert re.search(r"^engine: error: .*bad\.onnx: tensorrt-rtx cannot ", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad.engine").exists()


def test_plugin_is_not_registered(int8, tmp_path):
    words = ("engine", "build", int8, "--backend", RTX, "-o", tmp_path / "d.engine")
    done = attempt("-m", *words)
    assert done.returncode == 2
    assert "the plugin NMS_OPT_TRT (version 1) is not registered" in done.stderr
    assert not list(tmp_path.iterdir())


POLYGRAPHY_SCRIPT = """
import tensorrt_rtx as trt
from polygraphy.backend.trt import NetworkFromOnnxPath

def load_network():
    assert trt.get_plugin_registry().load_library({library!r})
    return NetworkFromOnnxPath({model!r}, strongly_typed=True)()
"""


def test_polygraphy_command_line(int8, trt_plugin_library, kernels, tmp_path):
    """Its --plugins registers nothing; a script that makes the network loads the library first."""
    links = tmp_path / "links"  # the wheel of TensorRT-RTX lacks the name that its parser opens
    links.mkdir()
    folder = Path(find_spec("tensorrt_rtx_libs").submodule_search_locations[0])
    (links / "libtensorrt_rtx.so").symlink_to(folder / "libtensorrt_rtx.so.1")
    script, engine = tmp_path / "network.py", tmp_path / "p.engine"
    names = {"library": str(trt_plugin_library), "model": str(int8)}
    script.write_text(POLYGRAPHY_SCRIPT.format(**names))
    command = [Path(sys.executable).with_name("polygraphy"), "convert"]
    rest = ["--convert-to", "trt", "-o", engine, "--strongly-typed"]
    rest += ["--compute-capabilities", "8.9"]
    for bound, batch in {"min": 1, "opt": 4, "max": 8}.items():
        rest += [f"--trt-{bound}-shapes", f"image:[{batch},3,400,400]"]
    run = functools.partial(
        subprocess.run,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "LD_LIBRARY_PATH": str(links)},
    )
    done = run([*command, int8, "--plugins", trt_plugin_library, *rest])
    assert "has no runners that implement it" in done.stdout + done.stderr  # the function's body
    assert not engine.exists()
    done = run([*command, script, "--model-type", "trt-network-script", *rest])
    assert done.returncode == 0, done.stderr
    check_plan(engine.read_bytes(), int8, 8, kernels)

"""An engine file where one is already, of models with data in another file."""

from __future__ import annotations

import pytest

from engine.backends.tensorrt.build import build
from engine.backends.tensorrt.module import RTX
from engine.backends.tensorrt.options import BuildOptions
from engine.errors import EngineError
from engine.manifest import load_manifest, manifest_path
from engine.model import load_detector
from tests.support.external import changed
from tests.support.rtx_plans import NEEDS_RTX

pytestmark = NEEDS_RTX


def test_an_engine_of_the_same_is_left(outside, surgered, plugin, tmp_path):
    """Another one is not replaced. TensorRT-RTX finds weights in another file."""
    options = BuildOptions(max_batch=2)
    path = tmp_path / "m.engine"
    built = build(load_detector(outside), RTX, path, options, overwrite=False)
    assert built.engine_bytes > outside.with_name("w.bin").stat().st_size / 2
    plan, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert build(load_detector(outside), RTX, path, options, overwrite=False) == built
    another = "m.engine: exists already, and is another: remove it or pass --force"
    for detector, choice in (
        (load_detector(surgered), options),
        (load_detector(changed(outside, tmp_path)), options),
        (load_detector(outside), BuildOptions(max_batch=3)),
    ):
        with pytest.raises(EngineError, match=another):
            build(detector, RTX, path, choice, overwrite=False)
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(plan[:-1])
    with pytest.raises(EngineError, match=another):
        build(load_detector(outside), RTX, path, options, overwrite=False)
    path.unlink()
    with pytest.raises(EngineError, match=another.replace(".engine", ".engine.json")):
        build(load_detector(outside), RTX, path, options, overwrite=False)
    assert build(load_detector(outside), RTX, path, options).onnx_sha256 == built.onnx_sha256
    assert load_manifest(path).engine_bytes == path.stat().st_size
    source = load_detector(outside)
    for name in (outside, outside.with_name("w.bin")):
        with pytest.raises(EngineError, match="is the input; give the output another name"):
            build(source, RTX, name, options)
    link = manifest_path(tmp_path / "n.engine")
    link.symlink_to(outside)
    with pytest.raises(EngineError, match=r"n\.engine\.json: is the input"):
        build(source, RTX, tmp_path / "n.engine", options)

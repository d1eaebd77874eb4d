"""The bench of mAPs on the demo model."""

from __future__ import annotations

import json
import shutil

from engine.bench import accuracy
from tests.support import ROOT


def test_a_model_is_as_good_as_itself(demo_surgered, demo_build, tmp_path) -> None:
    other = shutil.copy(demo_surgered, tmp_path / "other.onnx")
    accuracy.bench(
        [demo_surgered, other],
        val=demo_build / "preprocessed_data" / "demo-val" / "float32_400x400",
        annotations=ROOT / "demo" / "data" / "annotations" / "instances_val.json",
        output=tmp_path / "accuracy.json",
        images=6,
    )
    found = json.loads((tmp_path / "accuracy.json").read_text())
    first, second = found["models"].values()
    assert found["images"] == 6
    assert 0.3 < first["AP"] <= 1
    assert first == second
    assert {key: second[key] for key in ("ratio", "low", "high")} == dict.fromkeys(
        ("ratio", "low", "high"), 1
    )

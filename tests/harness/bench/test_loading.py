"""The bench of loading preprocessed images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.protocol import InputSpec
from harness.bench import loading as bench_loading
from harness.bench.loading import measure
from harness.errors import HarnessError


def test_loading_is_measured_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"file per image", "one file, read", "one file, mapped"}
    figures = measure(tmp_path, InputSpec("image", (3, 8, 8), "int8", 0.02), 70, 2)
    assert figures["milliseconds_per_image"].keys() == ways
    monkeypatch.setattr(bench_loading._Reader, "__call__", lambda *_: np.ones(3, np.int8))
    with pytest.raises(HarnessError, match="one file, read loads other images"):
        measure(tmp_path, InputSpec("image", (3, 8, 8), "int8", 0.02), 70, 2)
